"""What a CPU needs whatever the model turns out to be, begun before there is one: kernels, and memory for weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch

from shardwright.config import EngineConfig
from shardwright.errors import ShardwrightError
from shardwright.kernels.jit import compile_ahead
from shardwright.layers.packed_linear import memory_ahead
from shardwright.loading.checkpoint import checkpoint_files, checkpoint_path

LEAST_BYTES = 64 << 20
"""Fewer are had at once."""


def early_kernels(config: EngineConfig) -> None:
    """Have native kernels compiled beside what else it takes to start, where this process will run them."""
    if _is_on_cpu(config) and config.parallel.num_ranks == 1:
        compile_ahead()


def early_memory(config: EngineConfig, path: Path) -> AbstractContextManager[None]:
    """While open, memory for the packed weights of a model is made ready beside what else it takes to start.

    Args:
        config: of the engine.
        path: the model's directory.
    """
    num_bytes = _packed_bytes(config, path)
    return memory_ahead(num_bytes) if num_bytes >= LEAST_BYTES else nullcontext()


def _packed_bytes(config: EngineConfig, path: Path) -> int:
    """What weights will take at most if they are packed in the type that they are stored in; 0 if they will not be."""
    model = config.model
    is_packed = _is_on_cpu(config) and config.parallel.num_ranks == 1 and model.weight_format is None
    if not is_packed or model.load_format == "dummy":
        return 0
    with suppress(ShardwrightError, OSError):  # which come up again when they are read
        files = checkpoint_files(checkpoint_path(model.weights or path), model.load_format)
        return sum(file.stat().st_size for file in files)
    return 0


def _is_on_cpu(config: EngineConfig) -> bool:
    device = config.model.device
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())
