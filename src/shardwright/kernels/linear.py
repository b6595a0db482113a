"""Linear layers with bfloat16 weights for a few tokens, natively: half the memory traffic of float32, all sums in
float32.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from shardwright.kernels.jit import native_library

MAX_TOKENS = 16
"""Most tokens that the kernel takes at once, as in native/linear.cpp. More keep matrix products busy by themselves."""


def is_available() -> bool:
    """Whether the kernel is compiled, or can be now."""
    return native_library("linear") is not None


def linear_bf16(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`input @ weight.T + bias` in float32, rounded once.

    Args:
        input: [tokens, inner] bfloat16, at most MAX_TOKENS tokens.
        weight: [outer, inner] bfloat16, contiguous, on the CPU.
        bias: [outer] bfloat16, contiguous, or None.

    Returns: [tokens, outer] bfloat16.
    Raises: ValueError for too many tokens, or a layout that the kernel does not take.
    """
    library = native_library("linear")
    tokens, (outer, inner) = len(input), weight.shape
    if library is None or tokens > MAX_TOKENS or not weight.is_contiguous() or weight.dtype is not torch.bfloat16:
        raise ValueError(f"no native linear for {tokens} tokens and weights {tuple(weight.shape)} of {weight.dtype}")
    wide = input.float().contiguous()
    output = torch.empty(tokens, outer, dtype=torch.bfloat16)
    status = library.linear_bf16(
        ctypes.c_void_p(wide.data_ptr()),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(bias.data_ptr() if bias is not None else None),
        ctypes.c_void_p(output.data_ptr()),
        ctypes.c_int64(tokens),
        ctypes.c_int64(inner),
        ctypes.c_int64(outer),
    )
    assert status == 0
    return output


def linear_bf16_reference(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What linear_bf16 computes, in torch."""
    output = input.float() @ weight.float().T
    if bias is not None:
        output += bias.float()
    return output.to(torch.bfloat16)
