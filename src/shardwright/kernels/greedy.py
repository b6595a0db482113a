"""The most likely token of each row of logits, natively on the CPU: read once, in every type, rows side by side."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.kernels.jit import native_library

_TYPES = (torch.float32, torch.bfloat16)


def greedy(logits: Tensor) -> npt.NDArray[np.int64]:
    """The largest logit of each row, the first of equal ones; what is not a number is larger than all numbers.

    Args:
        logits: [n, vocab], any floating type, on any device.

    Returns: [n].
    """
    is_native = logits.device.type == "cpu" and logits.dtype in _TYPES and logits.stride(-1) == 1
    library = native_library("greedy") if is_native else None
    if library is None:
        return greedy_reference(logits)
    token_ids = np.empty(len(logits), dtype=np.int64)
    library.greedy(
        ctypes.c_int64(logits.dtype is torch.bfloat16),
        ctypes.c_void_p(logits.data_ptr()),
        *map(ctypes.c_int64, (*logits.shape, logits.stride(0))),
        ctypes.c_void_p(token_ids.ctypes.data),
    )
    return token_ids


def greedy_reference(logits: Tensor) -> npt.NDArray[np.int64]:
    """The same in torch. `max` is faster than `argmax`, in every dtype."""
    token_ids: npt.NDArray[np.int64] = logits.max(dim=-1).indices.cpu().numpy()
    return token_ids
