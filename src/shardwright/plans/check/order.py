"""Do the pipeline's entries stand in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.subject import Subject
from shardwright.plans.stack import LayerStack


def check_order(subject: Subject, stack: LayerStack) -> Iterator[Finding]:
    """Entries that stand where they do not run.

    Args:
        subject: its pipeline's names are all in the model.
        stack: the layers.
    """
    names = list(subject.plan.pp)
    places = _places(subject, stack)
    known = [name for name in names if name in places]
    right = sorted(known, key=lambda name: places[name])
    if known == right:
        return
    kept = _longest_rising([places[name] for name in known])
    for name in (name for number, name in enumerate(known) if number not in kept):
        place = right.index(name)
        when = f"after {right[place - 1]}" if place else f"before {right[1]}"
        yield Finding(
            Severity.ERROR,
            name,
            f"stands at the wrong place: it runs {when}",
            f"order: {', '.join(right)}",
            f"pp {name}",
        )


def _container(names: Sequence[str], stack: LayerStack) -> str:
    return next((name for name in names if stack.layers[0].startswith(name)), stack.container)


def _places(subject: Subject, stack: LayerStack) -> dict[str, int]:
    """When the modules of the pipeline's entries run for the first time, by a number that grows."""
    container = _container(list(subject.plan.pp), stack)
    flow = subject.flow
    if flow is None:
        return _places_by_kind(subject, container)
    starts = [argument.node for argument in flow.calls[0].arguments.values()]
    places = {container: max(starts, default=0)}
    for call in flow.modules:
        for name in subject.plan.pp:
            if (call.name == name or call.name.startswith(f"{name}.")) and call.nodes:
                places.setdefault(name, min(call.nodes))
    return places


def _places_by_kind(subject: Subject, container: str) -> dict[str, int]:
    """For code that cannot be traced: embeddings run before the layers, linears as wide as an embedding behind them."""
    rows = {module.num_embeddings for module in subject.modules.values() if isinstance(module, nn.Embedding)}
    places = {container: 1}
    for name in subject.plan.pp:
        module = subject.modules.get(name)
        if isinstance(module, nn.Embedding):
            places[name] = 0
        elif isinstance(module, nn.Linear) and module.out_features in rows:
            places[name] = 2
    return places


def _longest_rising(values: Sequence[int]) -> set[int]:
    """Numbers of the values of a longest rising subsequence."""
    best: list[list[int]] = []  # chains of numbers, one that ends at each value
    for end, value in enumerate(values):
        before: list[int] = []
        for chain in best:
            if values[chain[-1]] < value and len(chain) > len(before):
                before = chain
        best.append([*before, end])
    return set(sorted(best, key=len)[-1])
