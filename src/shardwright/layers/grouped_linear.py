"""Rows that go to different experts, each multiplied by the matrix of its expert.

Both steps are operations of PyTorch's, so that a recorded step can hold them (see replay/): what they give has a shape
that does not depend on which experts are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from shardwright.kernels.packed_linear import (
    LIBRARY,
    PACKED_TYPES,
    is_available,
    multiply_packed,
    pack_weight,
)
from shardwright.layers.packed_linear import most_packed_tokens, room_for_packed
from shardwright.layers.upcast_linear import SCRATCH_ELEMENTS, has_fast_half_products, widened_linear

LIBRARY.define("group_by_expert(Tensor chosen, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define("grouped_linear(Tensor rows, Tensor ends, Tensor[] matrices, Tensor[] packed, int outer) -> Tensor")

OLDEST_GROUPING_GPU = (8, 0)
"""Compute capability from which on torch multiplies all groups in one call."""
GROUPED_ROW_BYTES = 16
"""Rows and columns of the matrices are a multiple of this, or torch does not."""


def group_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put the choices of experts in the order of the experts.

    Args:
        chosen: [T, k] int64, experts of each token.
        num_experts: of which they are chosen.

    Returns: of each of the T * k places in the new order the token and the expert; of each choice, in the order of
        `chosen`, its place; and [num_experts] int32, where the places of each expert end.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.shardwright.group_by_expert(chosen, num_experts)
    return found


class ExpertMatrices:
    """The matrices of several experts.

    Args:
        matrices: of each expert, [in, out], views of any layout.
        packed: packed weights that there are already, by the address of the weight; others are packed too, on a CPU.
            None: none are, for a few products.
    """

    def __init__(self, matrices: Sequence[Tensor], packed: Mapping[int, Tensor] | None) -> None:
        first = matrices[0]
        self._out_features = first.shape[1]
        self._stacked = _stacked(matrices) if multiplies_grouped(first) else None
        self._packed = _packed(matrices, packed) if packed is not None and first.device.type == "cpu" else []
        is_always_packed = self._packed and most_packed_tokens(first.dtype) is None
        self._used = [] if is_always_packed else list(matrices)  # handing them over takes time

    def multiply(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Multiply rows by the matrices of their experts.

        Args:
            rows: [R, in], those of an expert beside each other, experts in order.
            ends: [E] int32, where those of each expert end.

        Returns: [R, out].
        """
        if self._stacked is not None:
            return torch.nn.functional.grouped_mm(rows, self._stacked, offs=ends)
        arguments = self._used, self._packed, self._out_features
        output: Tensor = torch.ops.shardwright.grouped_linear(rows, ends, *arguments)
        return output


def multiplies_grouped(matrix: Tensor) -> bool:
    """Whether the device of a matrix is best given all experts' matrices at once.

    Not a CPU: there torch multiplies them one by one too, and one by one they need not lie in one piece of memory.
    """
    if matrix.device.type != "cuda" or torch.cuda.get_device_capability(matrix.device) < OLDEST_GROUPING_GPU:
        return False
    return all(size * matrix.element_size() % GROUPED_ROW_BYTES == 0 for size in matrix.shape)


@torch.library.impl(LIBRARY, "group_by_expert", "CompositeExplicitAutograd")
def _group_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(max(len(order), num_experts), device=chosen.device)
    places = torch.empty_like(order).scatter_(0, order, numbers[: len(order)])
    ends = torch.searchsorted(experts, numbers[:num_experts], right=True, out_int32=True)
    return order // chosen.shape[1], experts, places, ends


@torch.library.impl(LIBRARY, "grouped_linear", "CompositeExplicitAutograd")
def _grouped_linear(rows: Tensor, ends: Tensor, matrices: list[Tensor], packed: list[Tensor], outer: int) -> Tensor:
    output = rows.new_empty(len(rows), outer)
    most_packed = most_packed_tokens(rows.dtype) if packed else 0
    is_widened = rows.device.type == "cpu" and rows.dtype is not torch.float32 and not has_fast_half_products()
    start = 0
    for number, end in enumerate(ends.tolist()):
        if end == start:
            continue
        own = rows[start:end]
        if most_packed is None or end - start <= most_packed:
            multiply_packed(own, packed[number], None, output[start:end])
        elif is_widened:
            scratch = _scratch(max(SCRATCH_ELEMENTS, own.shape[1]))
            output[start:end] = widened_linear(own, matrices[number].mT, None, scratch)
        else:
            torch.mm(own, matrices[number], out=output[start:end])
        start = end
    return output


def _stacked(matrices: Sequence[Tensor]) -> Tensor | None:
    """Matrices that lie evenly in one piece of memory, as one tensor [E, in, out]."""
    first = matrices[0]
    step = matrices[1].storage_offset() - first.storage_offset()
    is_even = all(
        matrix.untyped_storage()._cdata == first.untyped_storage()._cdata
        and matrix.storage_offset() == first.storage_offset() + number * step
        for number, matrix in enumerate(matrices)
    )
    return first.as_strided((len(matrices), *first.shape), (step, *first.stride())) if is_even else None


def _packed(matrices: Sequence[Tensor], packed: Mapping[int, Tensor]) -> list[Tensor]:
    """Packed weights of experts; none if they cannot be packed, or memory for them is short."""
    if not is_available() or matrices[0].dtype not in PACKED_TYPES:
        return []
    if all(m.data_ptr() in packed and m.mT.is_contiguous() for m in matrices):
        return [packed[m.data_ptr()] for m in matrices]
    weights = [m.mT for m in matrices]
    room = room_for_packed(weights, keeps=False)
    return [] if room is None else [pack_weight(weight, own.packed) for weight, own in zip(weights, room, strict=True)]


@cache
@torch.inference_mode(False)
def _scratch(size: int) -> Tensor:
    """[size] float32, shared by all experts: they are multiplied one after another."""
    return torch.empty(size)
