"""Types and sizes as Triton wants them."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from shardwright.kernels.triton.availability import is_interpreted

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operand_type(dtype: torch.dtype) -> Any:
    """What products take numbers of this type as: as they are. The interpreter multiplies no bfloat16, and float32
    holds the same numbers.
    """
    return tl.float32 if is_interpreted() and dtype is torch.bfloat16 else _TYPES[dtype]


def as_stored(rows: Tensor) -> Tensor:
    """A tensor as kernels take it: numbers of 8 bits by their bits."""
    return rows.view(torch.uint8) if rows.dtype is torch.float8_e4m3fn else rows


def power_of_two(size: int) -> int:
    """The smallest that is no smaller; sizes of tensors on the device are powers of two."""
    return 1 << (size - 1).bit_length()
