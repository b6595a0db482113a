"""Rules for operations that reduce dimensions, and for those that put elements elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shardwright.plans.flow.atoms import Labels, distinct
from shardwright.plans.flow.memory import Root
from shardwright.plans.flow.products import refs_of, unknown
from shardwright.plans.flow.record import Op, Ref
from shardwright.plans.flow.state import Flow, Operand

LINEAR_REDUCTIONS = frozenset(("aten.sum", "aten.cumsum", "aten.mean"))


def reduction(flow: Flow, op: Op) -> None:
    """Elements along some dimensions are computed from all of them: `sum`, `softmax`, `topk`."""
    data = op.args[0]
    labels, candidates = flow.memory.labels(data), flow.memory.candidates(data)
    if candidates is not None:
        flow.memory.fix(candidates)
    if labels is None:
        for out in op.outputs:
            flow.memory.write(out, None)
        return
    dims = _dims(op, len(data.size))
    if (labels < 0).any():
        if op.name in LINEAR_REDUCTIONS and (labels == labels.min()).all():
            flow.memory.write(op.outputs[0], np.full((1,) * len(op.outputs[0].size), labels.min(), dtype=np.int64))
            return
        flow.whole(labels)
        labels = None
    merged = flow.merge(labels, dims) if dims else labels
    for out in op.outputs:
        made = merged
        if made is not None and len(out.size) < len(data.size):
            made = made.reshape([size for axis, size in enumerate(made.shape) if axis not in dims])
        flow.memory.write(out, made)


def _dims(op: Op, rank: int) -> list[int]:
    place = 2 if op.name in ("aten.topk", "aten.linalg_vector_norm", "aten.norm") else 1
    given = op.kwargs.get("dim", op.args[place] if len(op.args) > place else None)
    if op.name == "aten.sort" and isinstance(given, bool):
        given = op.args[place + 1] if len(op.args) > place + 1 else -1
    if given is None or given == []:
        given = -1 if op.name in ("aten.topk", "aten.sort", "aten.argsort") else list(range(rank))
    return [d % rank for d in ([given] if isinstance(given, int) else given)] if rank else []


def normalization(flow: Flow, op: Op) -> None:
    """`native_layer_norm` and `_fused_rms_norm`: over the last dimensions, then scaled and shifted."""
    data, shape = op.args[:2]
    out = op.outputs[0]
    rank = len(data.size)
    labels = flow.merge(flow.memory.labels(data), range(rank - len(shape), rank))
    for ref in (a for a in op.args[2:] if isinstance(a, Ref)):
        candidates = flow.memory.candidates(ref)
        if candidates is not None:
            flow.memory.fix(candidates)
    flow.memory.write(out, labels)
    for rest in op.outputs[1:]:
        flow.memory.write(rest, labels if labels is not None and len(rest.size) == rank else None)


def movement(flow: Flow, op: Op) -> None:
    """Elements go elsewhere, and constants may come between: the operation itself is run on the labels."""
    memory = flow.memory
    refs = refs_of(op)
    labels = {ref: memory.labels(ref) for ref in refs if ref.storage not in memory.roots}
    if all(found is None for found in labels.values()):
        for ref in refs:
            memory.fix(memory.candidates(ref) or [])
        for out in op.outputs:
            memory.write(out, None)
        return
    if op.name == "aten.cat":
        return _concatenation(flow, op, refs)
    if any(ref.storage in memory.roots for ref in refs):
        return unknown(flow, op)

    def moved(value: Any) -> Any:
        if isinstance(value, Ref):
            found = labels[value]
            if found is None:
                return torch.zeros(value.size, dtype=torch.int64)
            return torch.from_numpy(np.array(found))
        return [moved(v) for v in value] if isinstance(value, list | tuple) else value

    result = op.func(*[moved(a) for a in op.args], **{k: moved(v) for k, v in op.kwargs.items()})
    for out, made in zip(op.outputs, result if isinstance(result, list | tuple) else [result], strict=True):
        memory.write(out, made.numpy())


def _concatenation(flow: Flow, op: Op, refs: list[Ref]) -> None:
    """Pieces one after another; parameters among them are cut as the others."""
    memory, out = flow.memory, op.outputs[0]
    axis = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % len(out.size)
    refs = [ref for ref in refs if len(ref.size) == len(out.size)]
    found = [memory.labels(ref) if ref.storage not in memory.roots else None for ref in refs]
    edges = [f.take([0], axis) for f in found if f is not None and (f == f.take([0], axis)).all()]
    pieces = []
    for ref, labels in zip(refs, found, strict=True):
        if ref.storage in memory.roots:
            edge = edges[0] if edges else None
            labels = flow.adopt(memory.candidates(ref) or [], edge)
        pieces.append(labels)
    whole = [
        Operand(None, flow.memory.full(r))
        for r, p in zip(refs, pieces, strict=True)
        if p is None and r.storage not in memory.constant
    ]
    for i, labels in enumerate(pieces):
        if labels is None or (labels < 0).any():
            continue
        rank = len(out.size)
        sides = [Operand(None, tuple(f and d != axis for d, f in enumerate(w.full))) for w in whole]
        pieces[i] = flow.combine([Operand(labels, (False,) * rank), *sides], rank)
    made = [
        np.broadcast_to(np.zeros((1,) * len(ref.size), dtype=np.int64) if p is None else p, ref.size)
        for p, ref in zip(pieces, refs, strict=True)
    ]
    memory.write(out, flow.atoms.find(np.concatenate(made, axis=axis)))


def lookup(flow: Flow, op: Op) -> None:
    """`index_select`, `gather`, `index`, `embedding`: elements at places that are known, or any of a dimension's."""
    memory, out = flow.memory, op.outputs[0]
    data = op.args[0]
    if op.name == "aten.embedding":
        axes, indices = [0], [op.args[1]]
    elif op.name == "aten.index":
        places = op.args[1]
        axes = [i for i, index in enumerate(places) if index is not None]
        indices = [index for index in places if index is not None]
    else:
        axes, indices = [op.args[1] % max(len(data.size), 1)], [op.args[2]]
    for index in indices:
        flow.whole(memory.labels(index))
    candidates = memory.candidates(data)
    if candidates is not None:
        name = flow.trace.parameters.get(data.storage)
        if op.name == "aten.embedding" and name is not None and indices[0].storage in flow.tokens:
            flow.tables.add(name)
            memory.fix([c for c in candidates if c.shape[1] > 1])
        elif axes == [0] and op.name != "aten.gather" and len(data.size) > 1:
            if name is not None:
                flow.stacked.add(name)
            memory.fix([c for c in candidates if len(c) > 1])
            lead = (1,) * len(indices[0].size)
            origins = memory.origins(data)
            kept = [
                (c.reshape(lead + c.shape[1:]), o) for c, o in zip(candidates, origins, strict=False) if len(c) == 1
            ]
            memory.roots[out.storage] = Root(out, tuple(c for c, _ in kept), tuple(o for _, o in kept))
            return
        else:
            memory.fix(candidates)
        memory.write(out, None)
        return
    labels = memory.labels(data)
    if labels is None:
        memory.write(out, None)
        return
    if op.name == "aten.gather":
        merged = flow.merge(labels, axes)
        others = Operand(None, tuple(f and d not in axes for d, f in enumerate(flow.memory.full(indices[0]))))
        memory.write(out, flow.combine([Operand(merged, flow.memory.full(out)), others], len(out.size)))
        return
    if any(index.value is None for index in indices):
        if (labels < 0).any():
            if not (labels == labels.min()).all():
                flow.whole(labels)
                labels = np.zeros_like(labels)
        else:
            merged = flow.merge(labels, axes)
            labels = np.zeros(data.size, dtype=np.int64) if merged is None else np.broadcast_to(merged, data.size)
    if any(not index.is_integral for index in indices):  # a mask: as many places as it lets through
        at = next(d for d, size in enumerate(labels.shape) if d == axes[0])
        picked = labels.take([0], at)
        for _ in range(len(indices[0].size) - 1):
            picked = picked.take([0], at + 1).squeeze(at + 1)
        memory.write(out, np.broadcast_to(picked, out.size))
        return
    known = [torch.zeros(i.size, dtype=torch.int64) if i.value is None else i.value for i in indices]
    source = torch.from_numpy(np.ascontiguousarray(labels))
    if op.name == "aten.index":
        chosen: list[Any] = [None] * len(op.args[1])
        for axis, index in zip(axes, known, strict=True):
            chosen[axis] = index
        result = torch.ops.aten.index.Tensor(source, chosen)
    elif op.name == "aten.embedding":
        result = source[known[0]]
    else:
        result = torch.index_select(source, axes[0], known[0])
    memory.write(out, result.numpy())


def insertion(flow: Flow, op: Op) -> None:
    """`index_add`, `index_put`, `scatter`: values into a tensor, at places along some dimensions."""
    memory, out = flow.memory, op.outputs[0]
    target = op.args[0]
    if op.name.startswith("aten.index_put"):
        indices = [index for index in op.args[1] if index is not None]
        axes = [i for i, index in enumerate(op.args[1]) if index is not None]
        source = op.args[2]
    elif op.name.startswith(("aten.index_add", "aten.index_copy")):
        axes, indices, source = [op.args[1] % len(target.size)], [op.args[2]], op.args[3]
    else:
        axes, indices = [op.args[1] % max(len(target.size), 1)], [op.args[2]]
        source = op.args[3] if len(op.args) > 3 else op.kwargs.get("value", op.kwargs.get("src"))
    for index in indices:
        flow.whole(memory.labels(index))
    mine = memory.labels(target)
    theirs = memory.labels(source) if isinstance(source, Ref) else None
    for ref in refs_of(op):
        memory.fix(memory.candidates(ref) or [])
    if mine is None and theirs is None:
        zero = target.storage in memory.zeros and not isinstance(source, Ref) and source == 0
        memory.write(out, None)
        if zero:
            memory.zeros.add(out.storage)
        return
    negative = [found for found in (mine, theirs) if found is not None and (found < 0).any()]
    if negative:
        numbers = {int(n) for found in negative for n in distinct(found)}
        neutral = (mine is not None or target.storage in memory.zeros) and theirs is not None
        if len(numbers) == 1 and neutral:
            memory.write(out, np.full((1,) * len(out.size), numbers.pop(), dtype=np.int64))
            return
        flow.whole(mine)
        flow.whole(theirs)
        memory.write(out, None)
        return
    merged = flow.merge(mine, axes)
    values = None
    if theirs is not None and isinstance(source, Ref) and len(source.size) == len(target.size) and len(axes) == 1:
        values = flow.merge(theirs, axes)
    elif theirs is not None:
        return unknown(flow, op)
    rank = len(out.size)
    sides = [Operand(merged, flow.memory.full(target))]
    if isinstance(source, Ref):
        full = (
            tuple(f and d not in axes for d, f in enumerate(flow.memory.full(source)))
            if len(source.size) == rank
            else ()
        )
        sides.append(Operand(values, full))
    memory.write(out, flow.combine(sides, rank))


def pairs(flow: Flow, op: Op) -> None:
    """`view_as_complex` and back: two numbers are one."""
    data, out = op.args[0], op.outputs[0]
    candidates = flow.memory.candidates(data)
    if candidates is not None:
        flow.memory.fix(candidates)
    labels = flow.memory.labels(data)
    if labels is None:
        flow.memory.write(out, None)
    elif op.name == "aten.view_as_complex":
        merged = flow.merge(labels, [len(data.size) - 1])
        flow.memory.write(out, None if merged is None else merged[..., 0])
    else:
        flow.memory.write(out, labels[..., None])


def merged_matrices(flow: Flow, op: Op) -> None:
    """Operations on whole matrices, such as solving with them: each in a batch by itself."""
    refs, out = refs_of(op), op.outputs[0]
    rank = len(out.size)
    sides = []
    for ref in refs:
        flow.memory.fix(flow.memory.candidates(ref) or [])
        merged: Labels | None = flow.merge(flow.memory.labels(ref), [len(ref.size) - 2, len(ref.size) - 1])
        sides.append(Operand(merged, (*flow.memory.full(ref)[:-2], False, False)))
    result = flow.combine(sides, rank)
    for made in op.outputs:
        flow.memory.write(made, result)
