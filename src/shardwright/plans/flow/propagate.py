"""Goes through a recorded forward pass and finds out what binds the parts of a model's parameters to each other.

What every rank has, times a weight, gives columns that ranks may divide among themselves. What is divided, times a
weight, gives partial sums, which are added up where the module ends. Everything between binds: a head's features by
their product with keys, gate and up by their product with each other, what is normalised by its mean. Where all of a
dimension is bound together, or a rank would need more than it has, the dimension is whole on every rank, and since
that changes what comes later, the whole way is gone again until nothing new turns up.
"""

from __future__ import annotations

import numpy as np
import torch

from shardwright.plans.flow import movements
from shardwright.plans.flow.elementwise import COPIES, elementwise
from shardwright.plans.flow.memory import thin
from shardwright.plans.flow.products import attention, convolution, product, refs_of, unknown
from shardwright.plans.flow.record import Exit, Op, Ref, Trace, is_factory
from shardwright.plans.flow.state import Fixed, Flow

MOST_PASSES = 12

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "mv", "dot", "addmv")
REDUCTIONS = (
    "sum", "mean", "_softmax", "_log_softmax", "_safe_softmax", "topk", "sort", "argsort", "argmax", "argmin", "max",
    "min", "amax", "amin", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "logsumexp", "var", "std",
    "linalg_vector_norm", "norm", "all", "any", "prod", "softmax", "log_softmax", "median",
)  # fmt: skip
MOVEMENTS = ("cat", "stack", "repeat", "flip", "roll", "constant_pad_nd", "tril", "triu", "repeat_interleave")
LOOKUPS = ("index", "index_select", "gather", "embedding")
INSERTIONS = ("index_add", "index_put", "index_copy", "scatter", "scatter_add", "scatter_reduce")
POINTWISE = ("copy", "fill", "masked_fill", "zero", "polar", "complex", "pow", "nan_to_num", "native_dropout")
WHOLE_MATRICES = ("linalg_solve_triangular", "linalg_inv_ex", "triangular_solve", "linalg_cholesky_ex")

RULES = (
    dict.fromkeys(PRODUCTS, product)
    | dict.fromkeys(REDUCTIONS, movements.reduction)
    | dict.fromkeys(MOVEMENTS, movements.movement)
    | dict.fromkeys(LOOKUPS, movements.lookup)
    | dict.fromkeys(INSERTIONS, movements.insertion)
    | dict.fromkeys(POINTWISE, elementwise)
    | dict.fromkeys(WHOLE_MATRICES, movements.merged_matrices)
    | {
        "convolution": convolution,
        "native_layer_norm": movements.normalization,
        "_fused_rms_norm": movements.normalization,
        "view_as_complex": movements.pairs,
        "view_as_real": movements.pairs,
    }
)


def propagate(trace: Trace) -> Flow:
    """Go through a trace until nothing new turns up."""
    fixed: Fixed = {}
    for _ in range(MOST_PASSES):
        flow = Flow(trace, fixed)
        run(flow)
        found = flow.fixed()
        if found.keys() == fixed.keys() and all(np.array_equal(found[key], fixed[key]) for key in found):
            break
        fixed = found
    return flow


def run(flow: Flow) -> None:
    """Go through a trace once."""
    trace = flow.trace
    flow.tokens.update(ref.storage for ref in trace.inputs.values() if ref.is_integral)
    for event in trace.events:
        if isinstance(event, Exit):
            _leave(flow, event)
        else:
            step(flow, event)


def step(flow: Flow, op: Op) -> None:
    """One operation."""
    stem = op.name.removeprefix("aten.").rstrip("_")
    inputs = refs_of(op)
    if is_factory(op.name):
        for out in op.outputs:
            flow.memory.write(out, None)
            flow.memory.constant.add(out.storage)
            if "zeros" in stem:
                flow.memory.zeros.add(out.storage)
        return
    storages = {ref.storage for ref in inputs}
    if op.outputs and all(out.storage in storages for out in op.outputs) and not op.name.endswith("_"):
        if stem in ("view", "_unsafe_view", "unflatten", "reshape"):
            _note_split(flow, inputs[0], op.outputs[0])
        return
    if "scaled_dot_product" in stem:
        return attention(flow, op)
    rule = RULES.get(stem)
    if rule is None:
        pointwise = torch.Tag.pointwise in op.func.tags or op.name in COPIES
        rule = elementwise if pointwise and len(op.outputs) == 1 else unknown
    rule(flow, op)


def _leave(flow: Flow, event: Exit) -> None:
    """At the end of a module its partial sums are added up, if they are all that it returns."""
    call = flow.trace.calls[event.call]
    due = -(event.call + 1)
    found = [flow.memory.labels(ref) for ref in call.outputs]
    if not any(labels is not None and (labels == due).any() for labels in found):
        return
    if all(labels is not None and (labels == due).all() for labels in found):
        flow.sums.add(call.module)
    else:
        flow.spoil(np.array([due]))
    for ref in call.outputs:
        flow.memory.replace(ref.storage, due, 0)


def _note_split(flow: Flow, before: Ref, after: Ref) -> None:
    """Remember the dimensions that a view divides, if they are cut."""
    if before.storage in flow.memory.roots:
        for candidate in flow.memory.candidates(after) or []:
            if sum(size > 1 for size in candidate.shape) > 1:
                flow.splits.append(candidate.squeeze())
        return
    labels = flow.memory.labels(before)
    if labels is None or (labels < 0).any() or thin(labels).size == 1:
        return
    made = np.ascontiguousarray(labels).reshape(after.size) if labels.size == np.prod(after.size) else None
    if made is None:
        return
    i = j = 0
    while i < len(before.size) and j < len(after.size):
        parts, size = [j], after.size[j]
        while size < before.size[i] and j + 1 < len(after.size):
            j += 1
            size *= after.size[j]
            parts.append(j)
        if size == before.size[i]:
            if sum(after.size[p] > 1 for p in parts) > 1 and (labels != labels.take([0], i)).any():
                index = tuple(slice(None) if d in parts else 0 for d in range(len(after.size)))
                flow.splits.append(made[index].copy())
        else:
            return
        i, j = i + 1, j + 1
