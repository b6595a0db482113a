"""Which back end computes attention: decided here, once, by device and type."""

from __future__ import annotations

import functools
import logging
from typing import Literal, cast

import torch

from shardwright.attention.batched import BatchedBackend
from shardwright.attention.layout import AttentionBackend
from shardwright.attention.native import NativeBackend
from shardwright.errors import ConfigError
from shardwright.kernels.attention import is_available as native_takes
from shardwright.kernels.triton.availability import why_not as why_not_triton

logger = logging.getLogger(__name__)

BackendName = Literal["native", "triton", "torch"]


def choose_backend(wanted: str, *, device: torch.device, dtype: torch.dtype) -> BackendName:
    """What "auto" means here: native kernels on a CPU, Triton's on a GPU, else torch's own operators.

    Args:
        wanted: a name, or auto.
        device: of model and cache.
        dtype: of queries, keys and values.

    Raises: ConfigError if the one asked for cannot run here, with the reason.
    """
    problems = {"native": _why_not_native(device, dtype), "triton": why_not_triton(device, dtype), "torch": None}
    if wanted == "auto":
        preferred: BackendName = "triton" if device.type == "cuda" else "native"
        if problems[preferred] is None:
            return preferred
        if device.type == "cuda":  # a missing native kernel has said so itself
            _warn_once(f"attention is computed by torch's own operators, which is slower: {problems[preferred]}")
        return "torch"
    if (problem := problems[wanted]) is not None:
        raise ConfigError(f"attention_backend is {wanted} but {problem}")
    return cast(BackendName, wanted)


def make_backend(
    name: BackendName, *, block_size: int, device: torch.device, compute_dtype: torch.dtype
) -> AttentionBackend:
    """The back end of a name that `choose_backend` gave.

    Args:
        name: of the back end.
        block_size: tokens per block.
        device: of model and cache.
        compute_dtype: of products in torch; float32 where the device is slow at the model's own.
    """
    batched = BatchedBackend(block_size=block_size, device=device, compute_dtype=compute_dtype)
    if name == "native":
        return NativeBackend(batched)
    if name == "triton":
        from shardwright.attention.triton import TritonBackend

        return TritonBackend(batched, device)
    return batched


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"native kernels are for CPUs, and the device is {device.type}"
    if not native_takes(dtype):
        return f"there is no native kernel for {str(dtype).removeprefix('torch.')}, or no C++ compiler"
    return None
