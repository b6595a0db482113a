"""Rules for operations that go element by element."""

from __future__ import annotations

import numpy as np

from shardwright.plans.flow.atoms import Labels, distinct
from shardwright.plans.flow.memory import Origin, Root
from shardwright.plans.flow.products import refs_of
from shardwright.plans.flow.record import Op, Ref
from shardwright.plans.flow.state import Flow, Operand

COPIES = frozenset(("aten.clone", "aten._to_copy", "aten.contiguous", "aten.alias_copy", "aten.lift_fresh"))


def elementwise(flow: Flow, op: Op) -> None:
    """Each element of the result comes from those of the arguments in its place."""
    memory, out = flow.memory, op.outputs[0]
    refs = refs_of(op)
    if op.name.endswith("_") and op.name in ("aten.copy_", "aten.fill_"):
        refs = refs[1:]
    if out.is_integral and any(ref.storage in flow.tokens for ref in refs):
        flow.tokens.add(out.storage)
    parameters = [ref for ref in refs if ref.storage in memory.roots]
    labels = {id(ref): memory.labels(ref) for ref in refs if ref.storage not in memory.roots}
    negative = [ref for ref in refs if (found := labels.get(id(ref))) is not None and (found < 0).any()]
    if negative:
        memory.write(out, _of_partial_sums(flow, op, refs, labels))
        return
    labelled = [ref for ref in refs if labels.get(id(ref)) is not None]
    tensors = [ref for ref in refs if any(memory.full(ref))]
    if len(tensors) == 1 and out.storage != tensors[0].storage:
        memory.note_copies(tensors[0], out)
    if parameters and not labelled and all(ref in parameters or not any(flow.memory.full(ref)) for ref in refs):
        if out.storage in memory.roots:
            return
        ways = [(memory.candidates(r) or [], memory.origins(r)) for r in parameters]
        memory.roots[out.storage] = _together(flow, ways, out)
        return
    if not labelled:
        for ref in parameters:
            memory.fix(memory.candidates(ref) or [])
        is_zero = op.name in COPIES and refs and refs[0].storage in memory.zeros
        memory.write(out, None)
        if is_zero:
            memory.zeros.add(out.storage)
        return
    operands = []
    for ref in refs:
        if ref.storage not in memory.roots:
            constant = ref.storage in memory.constant
            full = (False,) * len(ref.size) if constant and labels[id(ref)] is None else flow.memory.full(ref)
            operands.append(Operand(labels[id(ref)], full))
    rank = len(out.size)
    result = flow.combine(operands, rank)
    for ref in parameters:
        adopted = flow.adopt(memory.candidates(ref) or [], result)
        result = flow.combine([Operand(result, (False,) * rank), Operand(adopted, flow.memory.full(ref))], rank)
    memory.write(out, result)


def _together(flow: Flow, ways: list[tuple[list[Labels], tuple[Origin, ...]]], out: Ref) -> Root:
    """Ways to cut several parameters that are combined: those that all of them share."""
    rank = len(out.size)
    aligned = [[c.reshape((1,) * (rank - c.ndim) + c.shape) for c in candidates] for candidates, _ in ways]
    shared = list(zip(aligned[0], ways[0][1], strict=False))
    for others in aligned[1:]:
        kept = []
        for way, origin in shared:
            partner = next((c for c in others if c.shape == way.shape), None)
            if partner is None:
                flow.memory.fix([way])
            else:
                flow.atoms.bind(way, partner)
                kept.append((flow.atoms.find(way), origin))
        flow.memory.fix([c for c in others if not any(c.shape == way.shape for way, _ in kept)])
        shared = kept
    return Root(out, tuple(way for way, _ in shared), tuple(origin for _, origin in shared))


def _of_partial_sums(flow: Flow, op: Op, refs: list[Ref], labels: dict[int, Labels | None]) -> Labels | None:
    """Partial sums stay partial under what is linear; else they are given up."""
    memory, out = flow.memory, op.outputs[0]
    partial = [ref for ref in refs if (found := labels.get(id(ref))) is not None and (found < 0).any()]
    others = [ref for ref in refs if ref not in partial]
    numbers = {int(n) for ref in partial for n in distinct(labels[id(ref)])}  # type: ignore[arg-type]
    stem = op.name.removeprefix("aten.").rstrip("_")
    scalars = [a for a in op.args if isinstance(a, int | float) and not isinstance(a, bool)]
    allowed = False
    if len(numbers) == 1:
        if stem in ("clone", "_to_copy", "neg", "copy", "alias", "contiguous"):
            allowed = True
        elif stem == "mul" or (stem == "div" and refs[0] in partial):
            allowed = len(partial) == 1
            for ref in others:
                flow.whole(labels.get(id(ref)))
        elif stem in ("add", "sub"):
            biases = [ref for ref in others if ref.storage in memory.roots]
            for ref in biases:
                name = next((name for name, _ in memory.origins(ref)), "")
                owner, _, leaf = name.rpartition(".")
                here = flow.trace.calls[-next(iter(numbers)) - 1].module
                if leaf.endswith("bias") and owner == here:
                    flow.once.add(name)
                    others.remove(ref)
            allowed = not scalars and all(ref.storage in memory.zeros for ref in others)
        elif stem in ("masked_fill", "where"):
            allowed = stem == "masked_fill" and scalars == [0]
    for ref in others:
        if ref.storage in memory.roots:
            memory.fix(memory.candidates(ref) or [])
    if allowed:
        for ref in refs:
            if ref.storage in memory.roots:
                memory.fix(memory.candidates(ref) or [])
        return np.full((1,) * len(out.size), next(iter(numbers)), dtype=np.int64)
    for found in labels.values():
        flow.whole(found)
    return None
