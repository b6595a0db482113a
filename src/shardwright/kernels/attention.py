"""Attention over the paged cache, natively: nothing is gathered, and query heads share what they read.

One query of a sequence reads keys and values where they lie. For several, those of the context are packed as weights
are (native/packed.h) and multiplied at the rate of the cores; scores of positions that nobody sees are not computed,
but for the rest of a panel.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.kernels.jit import native_library

_TYPES = (torch.float32, torch.bfloat16)


def is_available(dtype: torch.dtype) -> bool:
    """Whether the kernel takes this type, and is compiled or can be now."""
    return dtype in _TYPES and native_library() is not None


def paged_attention(
    query_THD: Tensor,
    keys_NKD: Tensor,
    values_NKV: Tensor,
    starts: npt.NDArray[np.int64],
    tables: npt.NDArray[np.int32],
    first: npt.NDArray[np.int64],
    last: npt.NDArray[np.int64],
    *,
    block_size: int,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    bias_HN: Tensor | None,
) -> Tensor:
    """Attention of the queries of a step.

    Args:
        query_THD: [T, H, D] float32 or bfloat16, on the CPU; H is a multiple of K.
        keys_NKD: [num_slots, K, D], same type; rows of one token contiguous.
        values_NKV: [num_slots, K, V], same type; rows of one token contiguous.
        starts: [S + 1]: sequence i has queries starts[i] to starts[i + 1], which follow each other in it.
        tables: [S, max blocks], contiguous rows: block of positions i * block_size and on.
        first, last: [T], positions that each query sees, both included; the last is its own.
        block_size: tokens per block.
        scale, softcap, sinks_H, bias_HN: as attention.layout.AttentionParams has them.

    Returns: [T, H, V], type of the query. Its reference is attention/reference.py.
    """
    library = native_library()
    assert library is not None, "ask is_available first"
    num_queries, num_heads, key_dim = query_THD.shape
    num_kv_heads, value_dim = values_NKV.shape[1:]
    query_THD = query_THD.contiguous()
    sinks = None if sinks_H is None else sinks_H.float().contiguous()
    bias = None if bias_HN is None else bias_HN.float().contiguous()
    output = query_THD.new_empty(num_queries, num_heads, value_dim)
    library.paged_attention(
        ctypes.c_int(query_THD.dtype is torch.bfloat16),
        ctypes.c_int64(len(starts) - 1),
        ctypes.c_int64(num_kv_heads),
        ctypes.c_int64(num_heads // num_kv_heads),
        ctypes.c_int64(key_dim),
        ctypes.c_int64(value_dim),
        ctypes.c_int64(block_size),
        ctypes.c_int64(keys_NKD.stride(0)),
        ctypes.c_int64(values_NKV.stride(0)),
        ctypes.c_float(scale),
        ctypes.c_float(softcap or 0.0),
        ctypes.c_void_p(query_THD.data_ptr()),
        ctypes.c_void_p(keys_NKD.data_ptr()),
        ctypes.c_void_p(values_NKV.data_ptr()),
        ctypes.c_void_p(starts.ctypes.data),
        ctypes.c_void_p(tables.ctypes.data),
        ctypes.c_int64(tables.strides[0] // 4),
        ctypes.c_void_p(first.ctypes.data),
        ctypes.c_void_p(last.ctypes.data),
        ctypes.c_void_p(None if sinks is None else sinks.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_int64(0 if bias is None else bias.shape[1]),
        ctypes.c_void_p(output.data_ptr()),
    )
    return output
