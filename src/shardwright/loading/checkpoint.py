"""The safetensors files of a model directory, memory-mapped: one file or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shardwright.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint.

    Raises: CheckpointError if there are none, or one that the index names is missing.
    """
    index = path / INDEX_FILE
    if index.exists():
        try:
            files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise CheckpointError(f"the index {index} cannot be read: {type(exc).__name__}: {exc}") from exc
        if missing := [file.name for file in files if not file.exists()]:
            raise CheckpointError(
                f"{path} lacks {len(missing)} of the {len(files)} weight files its index names: "
                f"{', '.join(missing[:4])}; copy or download them again"
            )
        return files
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        other = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in path.glob(pattern))
        found = f" (it has {', '.join(other[:3])}, which are not read yet)" if other else ""
        raise CheckpointError(
            f"{path} has a config but no weights{found}: expected {SINGLE_FILE} or {INDEX_FILE}; "
            "to try the configuration with random weights, pass --load-format dummy"
        )
    return files


@contextmanager
def open_checkpoint(path: Path) -> Iterator[dict[str, Any]]:
    """Every tensor of the checkpoint by name, as a slice object that reads from the mapped file when indexed.

    Raises: CheckpointError if a file is truncated or no safetensors file.
    """
    with ExitStack() as stack:
        slices: dict[str, Any] = {}
        for file in checkpoint_files(path):
            opened = stack.enter_context(_open(file))
            slices |= {name: opened.get_slice(name) for name in list(opened.keys())}
        yield slices


def checkpoint_dtype(path: Path) -> torch.dtype | None:
    """Type of the first floating-point tensor of the checkpoint; None if there is no checkpoint or no such tensor."""
    try:
        with open_checkpoint(path) as slices:
            return next((_DTYPES[s.get_dtype()] for s in slices.values() if s.get_dtype() in _DTYPES), None)
    except CheckpointError:
        return None


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(
            f"{file} is damaged or truncated ({file.stat().st_size:,} bytes): {exc}; copy or download it again"
        ) from exc
