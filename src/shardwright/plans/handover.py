"""What a pipeline stage needs of the stages before it, worked out from the model's dataflow."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import inf

from shardwright.errors import PlanError
from shardwright.plans.dataflow import Dataflow
from shardwright.plans.nested import Form, Path


@dataclass(frozen=True, slots=True)
class Handover:
    """Tensors that a stage is given when it starts."""

    arguments: tuple[Path, ...] = ()
    """Of its first layer, which come from layers, or parameters, of earlier stages."""
    modules: tuple[str, ...] = ()
    """Modules before the layers whose outputs more than the first layer needs: Gemma-3n's embedding per layer."""
    idle: frozenset[str] = frozenset()
    """Modules outside of the layers whose outputs the stage does not need."""


def uncuttable(flow: Dataflow) -> frozenset[int]:
    """Numbers of layers with which no stage may begin: it would need what earlier layers made, and its first layer is
    not given that.
    """
    needed = _reaching(flow)
    latest: list[float] = []  # per node, the last layer with which a stage may begin that uses it
    found: set[int] = set()
    leaves = {argument.node: k for k, call in enumerate(flow.calls) for argument in call.arguments.values()}
    for number, node in enumerate(flow.nodes):
        oldest = min((latest[parent] for parent in node.parents), default=inf)
        user = leaves.get(number, node.layer)
        if user is None or oldest >= user:
            latest.append(oldest if node.layer is None else min(oldest, node.layer))
            continue
        if needed[number]:  # an argument can be handed over where its layer begins a stage
            found.update(range(int(oldest) + 1, user if number in leaves else user + 1))
        latest.append(user)
    behind = min((latest[number] for number in flow.logits), default=inf)
    if behind < len(flow.layers):
        found.update(range(int(behind) + 1, len(flow.layers)))
    return frozenset(found)


def _reaching(flow: Dataflow) -> list[bool]:
    """Per node, whether a layer, or the logits, are computed from it."""
    reaching = [node.layer is not None for node in flow.nodes]
    for number in flow.logits:
        reaching[number] = True
    for number in range(len(flow.nodes) - 1, -1, -1):
        if reaching[number]:
            for parent in flow.nodes[number].parents:
                reaching[parent] = True
    return reaching


def handover(flow: Dataflow, first: int, last: int, held: Collection[str], *, sent: Collection[Path] = ()) -> Handover:
    """What the stage of layers `first` to `last` (not included) is given.

    Args:
        flow: of the whole model.
        first, last: numbers of layers.
        held: names of the parameters that the stage holds.
        sent: arguments that it hands over to the next stage.

    Raises: PlanError if it needs something that cannot be handed over.
    """
    view = _View(flow, first, last, held, sent)
    found = view.handover()
    if found is None:
        raise PlanError(view.complaint())
    return found


def needed_parameters(flow: Dataflow, first: int, last: int) -> frozenset[str]:
    """Names of the parameters that the stage of layers `first` to `last` (not included) must hold: those that it
    computes with once it is given what it can be.
    """
    everything = frozenset(flow.parameters)
    sent: Collection[Path] = ()
    if last < len(flow.layers):
        before = _View(flow, 0, last, everything).needed_parameters()
        sent = _View(flow, last, len(flow.layers), everything - before).missing_arguments()
    before = _View(flow, 0, first, everything).needed_parameters() if first > 0 else frozenset()
    return _View(flow, first, last, everything - before, sent).needed_parameters()


class _View:
    """The dataflow as one stage sees it.

    Args:
        flow: of the whole model.
        first, last: layers of the stage.
        held: names of its parameters.
        sent: arguments of the layer behind its last.
    """

    def __init__(
        self, flow: Dataflow, first: int, last: int, held: Collection[str], sent: Collection[Path] = ()
    ) -> None:
        self._flow = flow
        self._first = first
        self._last = last
        ours = {node for name, node in flow.parameters.items() if name in held}
        self._missing = set(flow.parameters.values()) - ours
        self._calls = {
            call.nodes[0]: call.name
            for call in flow.modules
            if isinstance(call.returned, Form) and call.nodes[0] < flow.start
        }
        self._owners = {name.rpartition(".")[0] for name, node in flow.parameters.items() if node in self._missing}
        self._given: set[int] = set()
        self._results = list(flow.logits) if last == len(flow.layers) else []
        for path in sent:
            self._results += flow.calls[last].arguments[path].before

    def handover(self) -> Handover | None:
        """What makes the stage whole; None if nothing does."""
        arguments = self.missing_arguments() if self._first > 0 else ()
        self._given = {self._flow.calls[self._first].arguments[path].node for path in arguments}
        modules = self._modules() if self._first > 0 else ()
        if self._first_lost() is not None:
            return None
        needed = self._needed(self._last, self._results)
        used = {call.name for call in self._flow.modules if any(needed[node] for node in call.nodes)}
        idle = frozenset(call.name for call in self._flow.modules) - used - frozenset(modules)
        return Handover(arguments, modules, idle)

    def missing_arguments(self) -> tuple[Path, ...]:
        """Of the stage's first layer, those that are not what they should be, and that it or a later stage needs."""
        lost, needed = self._lost(), self._needed(len(self._flow.layers), self._flow.logits)
        arguments = self._flow.calls[self._first].arguments
        return tuple(path for path, a in arguments.items() if needed[a.node] and any(lost[n] for n in a.before))

    def needed_parameters(self) -> frozenset[str]:
        """Names of parameters, held or not, that the stage computes with."""
        self.handover()
        needed = self._needed(self._last, self._results)
        return frozenset(name for name, node in self._flow.parameters.items() if needed[node])

    def complaint(self) -> str:
        """What cannot be handed over."""
        flow, node = self._flow, self._first_lost()
        assert node is not None
        user = _maker(flow, node, "the code behind the layers")
        sources = self._sources(node)
        makers = [_maker(flow, n, "code before the layers") for n in sources if n not in self._missing]
        if makers:
            return (
                f"{user} uses what {makers[0]} made, past the layers between them: no stage may begin before "
                f"{flow.layers[self._first]}"
            )
        name = next(name for name, number in flow.parameters.items() if number in sources)
        return (
            f"{user} uses {name}, which its pipeline stage does not hold: leave {name.rpartition('.')[0]} out of the "
            "pipeline plan, and every stage that needs it holds it"
        )

    def _sources(self, node: int) -> list[int]:
        """What a lost node is computed from and is not on this stage: parameters, and results of layers."""
        lost, seen, pending, sources = self._lost(), set[int](), [node], []
        while pending:
            number = pending.pop()
            if number in seen or not lost[number]:
                continue
            seen.add(number)
            layer = self._flow.nodes[number].layer
            if number in self._missing or (layer is not None and layer < self._first):
                sources.append(number)
            else:
                pending += self._flow.nodes[number].parents
        return sources

    def _modules(self) -> tuple[str, ...]:
        """Modules whose outputs must be given too, because arguments do not hold all that is lost; they are given."""
        lost, needed = self._lost(), self._needed(self._last, self._results)
        wanted = {node for node, name in self._calls.items() if name in self._owners and lost[node] and needed[node]}
        self._given |= wanted
        needed = self._needed(self._last, self._results)  # what comes before such a module may now be needed no more
        kept = {node for node in wanted if any(needed[c] for c in self._children(node))}
        self._given -= wanted - kept
        names = [self._calls[node] for node in sorted(kept)]
        if len(set(names)) != len(names):  # called more than once
            self._given -= kept
            return ()
        return tuple(names)

    def _first_lost(self) -> int | None:
        """The first thing that the stage computes from what it does not have."""
        lost, nodes = self._lost(), self._flow.nodes
        own = (n for n, is_lost in enumerate(lost) if is_lost and self._is_own(nodes[n].layer))
        return next(own, next((n for n in self._results if lost[n]), None))

    def _lost(self) -> list[bool]:
        """Per node, whether it is not what it should be on this stage."""
        first, given, missing = self._first, self._given, self._missing
        lost = [False] * len(self._flow.nodes)
        for number, node in enumerate(self._flow.nodes):  # some hundred times as many as there are layers
            if number in given:
                continue
            if number in missing or (node.layer is not None and node.layer < first):
                lost[number] = True
                continue
            for parent in node.parents:
                if lost[parent]:
                    lost[number] = True
                    break
        return lost

    def _needed(self, last: int, results: Collection[int]) -> list[bool]:
        """Per node, whether layers from the stage's first to `last` (not included), or the results, come from it."""
        nodes = self._flow.nodes
        needed = [node.layer is not None and self._first <= node.layer < last for node in nodes]
        for number in results:
            needed[number] = True
        for number in range(len(nodes) - 1, -1, -1):
            layer = nodes[number].layer
            runs = layer is None or layer >= self._first
            if needed[number] and runs and number not in self._given:
                for parent in nodes[number].parents:
                    needed[parent] = True
        return needed

    def _children(self, number: int) -> list[int]:
        return [n for n, node in enumerate(self._flow.nodes) if number in node.parents and n not in self._given]

    def _is_own(self, layer: int | None) -> bool:
        return layer is not None and self._first <= layer < self._last


def _maker(flow: Dataflow, node: int, otherwise: str) -> str:
    """The layer that computes a node."""
    layer = flow.nodes[node].layer
    return flow.layers[layer] if layer is not None else otherwise
