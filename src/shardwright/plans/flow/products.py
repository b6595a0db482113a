"""Rules for products: where dimensions of weights are cut, and where partial sums are added up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardwright.plans.flow.atoms import Labels, distinct
from shardwright.plans.flow.memory import Origin, thin
from shardwright.plans.flow.record import Op, Ref
from shardwright.plans.flow.state import Closing, Flow, Operand


def product(flow: Flow, op: Op) -> None:
    """`mm`, `bmm`, `addmm`, `baddbmm`, `_grouped_mm`, `mv`, `dot`."""
    refs = [a for a in op.args if isinstance(a, Ref)]
    added = refs.pop(0) if op.name in ("aten.addmm", "aten.baddbmm", "aten.addmv", "aten.addbmm") else None
    left, right = refs[:2]
    out = op.outputs[0]
    if op.name in ("aten._grouped_mm", "aten.addbmm") and not (len(left.size) == 2 and len(right.size) == 3):
        return unknown(flow, op)
    for ref in (left, right):
        if len(ref.size) == 3 and (name := flow.trace.parameters.get(ref.storage)) is not None:
            flow.stacked.add(name)
    result = multiply(flow, op.call, _side(flow, left, is_left=True), _side(flow, right, is_left=False))
    if result is not None:
        result = result.reshape(result.shape[3 - len(out.size) :]) if len(out.size) > 1 else result.ravel()
    flow.memory.write(out, _with_bias(flow, result, added, out) if added is not None else result)


def convolution(flow: Flow, op: Op) -> None:
    """Along tokens: of each channel by itself, or of all channels."""
    data, weight, bias = op.args[:3]
    out, groups = op.outputs[0], op.args[8]
    labels, candidates = flow.memory.labels(data), flow.memory.candidates(weight)
    channels = data.size[1]
    if candidates is None or len(data.size) < 3:
        return unknown(flow, op)
    if groups == 1:
        spread = range(2, len(data.size))
        rows = flow.merge(labels, [0, *spread]) if labels is not None else None
        ways = [c.reshape(c.shape[0], c.shape[1]).T[None] for c in candidates if max(c.shape[2:], default=1) == 1]
        flow.memory.fix([c for c in candidates if max(c.shape[2:], default=1) > 1])
        matrix = None if rows is None else np.broadcast_to(rows.reshape(1, 1, channels), (1, 1, channels))
        made = multiply(flow, op.call, Side(matrix), Side(candidates=ways))
    elif groups == channels == out.size[1]:
        rows = None if labels is None else flow.merge(labels, range(2, len(data.size)))
        by_channel = None if rows is None else rows.reshape(rows.shape[0], -1)
        adopted = flow.adopt([c.reshape(1, -1) for c in candidates if c.shape[0] > 1], by_channel)
        whole = Operand(adopted, (False, True))
        made = flow.combine([Operand(by_channel, (False, True)), whole], 2) if by_channel is not None else None
        made = None if made is None else made[:, None, :]
        flow.memory.fix([c for c in candidates if c.shape[0] == 1])
    else:
        return unknown(flow, op)
    if made is not None:
        made = made.reshape(made.shape[0], -1, *[1] * (len(data.size) - 2))
        made = np.broadcast_to(made, out.size)
    if isinstance(bias, Ref):
        shape = [-1] + [1] * (len(data.size) - 2)
        ways = [c.reshape(shape) for c in flow.memory.candidates(bias) or []]
        if made is None or (made < 0).any():
            flow.memory.fix(ways)
        elif flow.adopt(ways, made) is None:
            made = flow.merge(made, [1])
    flow.memory.write(out, made)


def attention(flow: Flow, op: Op) -> None:
    """Fused attention: [batch, heads, tokens, width], key and value heads perhaps fewer than query heads."""
    query, key, value = op.args[:3]
    groups = query.size[1] // key.size[1]
    shared = [flow.merge(flow.memory.labels(ref), [2, 3]) for ref in (query, key, value)]
    for i in (1, 2):
        if (labels := shared[i]) is not None:
            shared[i] = np.repeat(labels, groups, axis=1) if labels.shape[1] > 1 else labels
    for ref in (query, key, value):
        flow.memory.fix(flow.memory.candidates(ref) or [])
    labels = flow.combine(
        [Operand(s, (False, ref.size[1] > 1, False, False)) for s, ref in zip(shared, (query,) * 3, strict=True)], 4
    )
    if labels is not None:
        flow.heads.append(labels)
    for rest in (a for a in (*op.args[3:], *op.kwargs.values()) if isinstance(a, Ref)):
        mask = flow.memory.labels(rest)
        flow.whole(mask)
        flow.memory.fix(flow.memory.candidates(rest) or [])
    for out in op.outputs:
        if labels is not None and len(out.size) >= 3 and out.size[1] == query.size[1]:
            flow.memory.write(out, np.broadcast_to(labels[..., 0] if len(out.size) == 3 else labels, out.size))
        else:
            flow.memory.write(out, None)


def unknown(flow: Flow, op: Op) -> None:
    """An operation without a rule: every rank must have all that it takes."""
    involved = False
    for ref in refs_of(op):
        labels, candidates = flow.memory.labels(ref), flow.memory.candidates(ref)
        involved |= labels is not None
        flow.whole(labels)
        if candidates is not None:
            flow.memory.fix(candidates)
    if involved:
        flow.unknown.add(op.name)
    for out in op.outputs:
        flow.memory.write(out, None)


def refs_of(op: Op) -> list[Ref]:
    """Tensors among the arguments of an operation, in lists of them too."""
    found: list[Ref] = []
    for value in (*op.args, *op.kwargs.values()):
        found += [v for v in (value if isinstance(value, list | tuple) else (value,)) if isinstance(v, Ref)]
    return found


@dataclass(frozen=True, slots=True)
class Side:
    """One factor of a product, as a batch of matrices."""

    labels: Labels | None = None
    """Of an activation."""
    candidates: list[Labels] | None = None
    """Of a parameter: broadcastable, of size 1 along dimensions in which they do not differ."""
    origins: tuple[Origin, ...] = ()
    """Of the candidates."""
    has_batch: bool = False
    """Whether the matrices of a batch differ."""


def _side(flow: Flow, ref: Ref, *, is_left: bool) -> Side:
    if len(ref.size) == 1:
        shape: tuple[int, ...] = (1, 1, ref.size[0]) if is_left else (1, ref.size[0], 1)
    else:
        shape = (1,) * (3 - len(ref.size)) + ref.size
    labels, candidates = flow.memory.labels(ref), flow.memory.candidates(ref)
    if candidates is not None:
        ways = [c.reshape(shape if c.ndim == 1 else (1,) * (3 - c.ndim) + c.shape) for c in candidates]
        return Side(candidates=ways, origins=flow.memory.origins(ref))
    has_batch = len(ref.size) == 3 and flow.memory.full(ref)[0]
    return Side(None if labels is None else labels.reshape(shape), has_batch=has_batch)


def multiply(flow: Flow, call: int, left: Side, right: Side) -> Labels | None:
    """Labels of a product, broadcastable to [batch, rows of the left, columns of the right].

    Args:
        flow: state.
        call: the module call that the product is in.
        left: [batch, rows, inner].
        right: [batch, inner, columns].
    """
    if left.candidates is not None and right.candidates is not None:
        flow.memory.fix(left.candidates)
        flow.memory.fix(right.candidates)
        return None
    if right.candidates is not None:
        return _by_parameter(flow, call, left, right.candidates, right.origins)
    if left.candidates is not None:
        turned = None if right.labels is None else right.labels.swapaxes(1, 2)
        data = Side(turned, has_batch=right.has_batch)
        made = _by_parameter(flow, call, data, [c.swapaxes(1, 2) for c in left.candidates], left.origins)
        return None if made is None else made.swapaxes(1, 2)
    return _of_activations(flow, left, right)


def _by_parameter(
    flow: Flow, call: int, factor: Side, candidates: list[Labels], origins: tuple[Origin, ...]
) -> Labels | None:
    """An activation times a weight, of which `candidates` are [batch, inner, columns], of size 1 where all the same.

    What every rank has gives columns that are cut. What is cut by columns gives partial sums.
    """
    columns = [c for c in candidates if c.shape[2] > 1 and c.shape[1] == 1]
    columns.sort(key=lambda c: len(distinct(c)), reverse=True)
    inner = [c for c in candidates if c.shape[1] > 1 and c.shape[2] == 1]
    batch = [c for c in candidates if c.shape[1] == c.shape[2] == 1]
    mixed = [c for c in candidates if c.shape[1] > 1 and c.shape[2] > 1]
    if factor.has_batch and factor.labels is None:  # its matrices are whole, so that those of the weight must be
        mixed += [c for c in columns if len(c) > 1]
        columns = [c for c in columns if len(c) == 1]
    flow.memory.fix(mixed)
    data = factor.labels
    if data is not None:
        data = flow.atoms.find(thin(data))
        if (data <= 0).any() or len(distinct(data)) == 1:
            flow.whole(data)
            data = None
    if data is None:
        flow.memory.fix([*columns[1:], *inner])
        if not columns:
            return None
        flow.cut.update(o for c, o in zip(candidates, origins, strict=False) if c is columns[0])
        column = flow.atoms.find(columns[0])
        return column if column.any() else None
    if data.shape[2] == 1 or (data == data[:, :, :1]).all():
        flow.memory.fix([*columns, *inner])
        made = flow.merge(data[:, :, :1], [1]) if data.shape[0] > 1 and batch else None
        if made is not None and flow.adopt(batch, made) is not None:
            return flow.atoms.find(data[:, :, :1])
        flow.memory.fix(batch)
        return flow.atoms.find(data[:, :, :1])
    if inner and (data.shape[1] == 1 or (data == data[:, :1]).all()):
        chosen = next((c for c in inner if _is_one_to_one(c, data[:, :1].swapaxes(1, 2))), inner[0])
        way, taken = np.broadcast_arrays(chosen, data[:, :1].swapaxes(1, 2))
        flow.atoms.bind(way, taken)
        origin = next((o for c, o in zip(candidates, origins, strict=False) if c is chosen), None)
        flow.closings.append(Closing(call, taken.copy(), origin))
        return np.full((1, 1, 1), -(call + 1), dtype=np.int64)
    flow.memory.fix(candidates)
    return flow.merge(data, [2])


def _is_one_to_one(candidate: Labels, labels: Labels) -> bool:
    """Whether each part of a weight meets one label, for there may be several ways to cut what is summed over."""
    pairs = np.unique(np.stack([side.ravel() for side in np.broadcast_arrays(candidate, labels)]), axis=1)
    return bool(len(distinct(pairs[0])) == pairs.shape[1])


def _of_activations(flow: Flow, one: Side, other: Side) -> Labels | None:
    """Two activations: what is summed over is bound, and so are the columns of each matrix of values."""
    left = flow.merge(one.labels, [2])
    right = flow.merge(other.labels, [1] if left is None else [1, 2])
    rows = left is not None and left.shape[1] > 1
    columns = right is not None and right.shape[2] > 1
    sides = [Operand(left, (one.has_batch, rows, False)), Operand(right, (other.has_batch, False, columns))]
    made = flow.combine(sides, 3)
    if left is not None and right is not None and made is not None:
        flow.heads.append(made)
    return made


def _with_bias(flow: Flow, labels: Labels | None, bias: Ref, out: Ref) -> Labels | None:
    """Labels of a product to which something is added."""
    candidates = flow.memory.candidates(bias)
    if candidates is None:
        rank = len(out.size)
        if labels is not None and (labels < 0).any():
            if bias.storage not in flow.memory.zeros:
                flow.whole(labels)
                return None
            return labels
        other = Operand(flow.memory.labels(bias), flow.memory.full(bias))
        mine = Operand(labels, flow.memory.full(out) if labels is not None else (False,) * rank)
        return flow.combine([mine, other], rank)
    if labels is not None and (labels < 0).any():
        flow.memory.fix(candidates)
        flow.once.add(flow.trace.parameters[bias.storage]) if bias.storage in flow.trace.parameters else flow.whole(
            labels
        )
        return labels
    if labels is None:
        flow.memory.fix(candidates)
        return None
    sides = [Operand(labels, flow.memory.full(out)), Operand(flow.adopt(candidates, labels), flow.memory.full(bias))]
    return flow.combine(sides, len(out.size))
