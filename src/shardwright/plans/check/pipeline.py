"""Entries of the pipeline plan: are they there, in order, and do they take and give what their code does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.order import check_order
from shardwright.plans.check.subject import Subject, nearest
from shardwright.plans.plan import PipelineEntry
from shardwright.plans.stack import LayerStack, find_stack, stack_in

SAME_TENSOR = frozenset({"inputs_embeds", "hidden_states"})
"""Two names that Transformers has for what an embedding gives and the first layer takes."""


def pipeline_line(name: str, entry: PipelineEntry) -> str:
    """An entry of a pipeline plan as it is pasted."""

    def names(side: tuple[str, ...]) -> str:
        return "[" + ", ".join(f'"{n}"' for n in side) + "]"

    return f'"{name}": [{names(entry.inputs)}, {names(entry.outputs)}]'


def check_pipeline(subject: Subject) -> Iterator[Finding]:
    """Names, containers, order, inputs and outputs of the pipeline's entries."""
    stacks: dict[str, LayerStack] = {}
    found = True
    for name in subject.plan.pp:
        try:
            stack = stack_in(subject.module, name)
        except PlanError:
            found = False
            yield _missing(subject, name)
            continue
        if stack is not None and not _is_inside_layer(subject, name):
            stacks[name] = stack
    if not subject.plan.pp:
        return
    found_so_far = [
        *_check_containers(subject, stacks, all_found=found),
        *_check_nesting(subject),
        *_check_inputs(subject, stacks),
        *(check_order(subject, max(stacks.values(), key=lambda s: len(s.layers))) if found and stacks else ()),
    ]
    yield from found_so_far
    yield from _check_no_split(subject)
    if found and not any(finding.severity is Severity.ERROR for finding in found_so_far):
        yield from _check_outputs(subject, stacks)


def _missing(subject: Subject, name: str) -> Finding:
    taken = set(subject.plan.pp)
    candidates = [n for n in subject.modules if n and n not in taken]
    container = find_stack(subject.module)
    near = nearest(name, candidates)
    if near is not None and "*" in near and container is not None:
        near = container.container
    fix = pipeline_line(near, subject.plan.pp[name]) if near else "leave it out"
    hint = f"; did you mean {near}?" if near else ""
    return Finding(
        Severity.ERROR, name, f"the pipeline names a module that is not in the model{hint}", fix, f"pp {name}"
    )


def _is_inside_layer(subject: Subject, name: str) -> bool:
    stack = find_stack(subject.module)
    return stack is not None and any(name == layer or name.startswith(f"{layer}.") for layer in stack.layers)


def _check_containers(subject: Subject, stacks: dict[str, LayerStack], *, all_found: bool) -> Iterator[Finding]:
    stack = find_stack(subject.module)
    for name in subject.plan.pp:
        module = subject.modules.get(name)
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and not len(module):
            yield Finding(
                Severity.ERROR, name, f"{type(module).__name__} holds no layers", "leave it out", f"pp {name}"
            )
    if stack is None:
        yield Finding(
            Severity.ERROR, "pp_plan", "no block of layers repeats in the model: it cannot be a pipeline", "--pp 1"
        )
    elif len(stacks) > 1:
        names = ", ".join(stacks)
        most = max(stacks, key=lambda name: len(stacks[name].layers))
        yield Finding(
            Severity.WARNING,
            next(name for name in stacks if name != most),
            f"several entries hold layers ({names}): stages are cut between those of {most} alone",
        )
    elif not stacks and all_found:
        inside = next((name for name in subject.plan.pp if _is_inside_layer(subject, name)), None)
        entry = subject.plan.pp[inside] if inside else PipelineEntry(("hidden_states",), ("hidden_states",))
        what = f"is inside of {stack.container}" if inside else f"no entry names {stack.container}"
        yield Finding(
            Severity.ERROR,
            inside or stack.container,
            f"{what}, which holds the layers: they would all be on every stage",
            pipeline_line(stack.container, entry),
            f"pp {inside or stack.container}",
        )


def _check_no_split(subject: Subject) -> Iterator[Finding]:
    classes = {type(module).__name__ for module in subject.modules.values()}
    unknown = sorted(name for name in subject.plan.no_split if name not in classes)
    if unknown and len(unknown) == len(subject.plan.no_split):
        near = nearest(unknown[0], classes)
        yield Finding(
            Severity.WARNING,
            f"no_split {unknown[0]}",
            f"no module is of this class{f'; did you mean {near}?' if near else ''}",
            f'"no_split": ["{near}"]' if near else "leave it out",
        )


def _check_nesting(subject: Subject) -> Iterator[Finding]:
    for inner in subject.plan.pp:
        outer = next((name for name in subject.plan.pp if inner.startswith(f"{name}.")), None)
        if outer is not None:
            yield Finding(
                Severity.ERROR,
                inner,
                f"is inside of {outer}, which is an entry of its own",
                "leave it out",
                f"pp {inner}",
            )


def _check_inputs(subject: Subject, stacks: dict[str, LayerStack]) -> Iterator[Finding]:
    """Inputs that the forward of a module does not take, and those that it cannot do without."""
    for name, entry in subject.plan.pp.items():
        module = subject.modules.get(stacks[name].layers[0] if name in stacks else name)
        if module is None or _is_of_torch(module):
            continue
        parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.name != "self"]
        known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        needed = [p.name for p in parameters if p.default is p.empty and p.name in known]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        unknown = [n for n in entry.inputs if n not in known]
        lacking = [n for n in needed if n not in entry.inputs]
        if not known or (not unknown and not lacking) or len(known) == len(entry.inputs) == 1:
            continue  # of a single argument, the name does not matter
        right = {n if n in known else nearest(n, known) for n in entry.inputs} | set(lacking)
        forward = f"{type(module).__name__}.forward({', '.join(known)}{', **' if takes_any else ''})"
        fixed = PipelineEntry(tuple(n for n in known if n in right), entry.outputs)
        if unknown and (not takes_any or lacking or nearest(unknown[0], known)):
            message, severity = f"takes no {unknown[0]}: it is {forward}", Severity.ERROR
        elif lacking and lacking[0] == needed[0] and name in stacks:
            message, severity = f"needs {lacking[0]}, which is not among its inputs: it is {forward}", Severity.ERROR
        elif lacking:
            message, severity = f"takes {', '.join(lacking)} too: it is {forward}", Severity.NOTE
        else:
            message, severity = f"names no {unknown[0]}: it is {forward}", Severity.NOTE
        yield Finding(severity, name, message, pipeline_line(name, fixed), f"pp {name}")


def _check_outputs(subject: Subject, stacks: dict[str, LayerStack]) -> Iterator[Finding]:
    """Outputs that nothing behind them takes."""
    entries = list(subject.plan.pp.items())
    for number, (name, entry) in enumerate(entries):
        if not entry.outputs:
            yield Finding(Severity.ERROR, name, "gives nothing: it has no outputs", "", f"pp {name}")
        elif name in stacks and len(stacks[name].layers) > 1 and not set(entry.outputs) & set(entry.inputs):
            taken = entry.inputs[:1] or ("hidden_states",)
            yield Finding(
                Severity.ERROR,
                name,
                f"gives {', '.join(entry.outputs)}, but each layer takes {', '.join(entry.inputs)} from the one before",
                pipeline_line(name, PipelineEntry(entry.inputs or taken, taken)),
                f"pp {name}",
            )
        elif number + 1 < len(entries):
            following, taker = entries[number + 1]
            given, taken_names = set(entry.outputs), set(taker.inputs)
            if given & taken_names or (given & SAME_TENSOR and taken_names & SAME_TENSOR) or not taken_names:
                continue
            if following not in stacks and taken_names <= _arguments(subject.modules[following]):
                continue  # its own names for what it is given
            better = PipelineEntry(entry.inputs, taker.inputs[:1])
            yield Finding(
                Severity.ERROR,
                name,
                f"gives {', '.join(entry.outputs)}, but {following} behind it takes {', '.join(taker.inputs)}",
                pipeline_line(name, better),
                f"pp {name}",
            )


def _arguments(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _is_of_torch(module: nn.Module) -> bool:
    """Whether its forward is PyTorch's, which calls its argument by a name of its own."""
    return type(module).__module__.startswith("torch.")
