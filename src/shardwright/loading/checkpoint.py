"""The files of a checkpoint and the tensors in them, memory-mapped: safetensors or torch.save, one file or shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardwright.config import LoadFormat
from shardwright.errors import CheckpointError
from shardwright.loading.torch_checkpoint import read_torch_file
from shardwright.loading.weight_map import find_weight_map

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"

_TORCH_PATTERNS = ("*.bin", "*.pt", "*.pth")
_TORCH_SHARD = re.compile(r"pytorch_model-\d+-of-\d+\.bin")
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")
"""What trainers leave beside the weights."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def checkpoint_path(named: str | Path) -> Path:
    """The folder or file of weights that the user named. Raises CheckpointError if it is not there."""
    path = Path(named).expanduser()
    if not path.exists():
        raise CheckpointError(f"no weights at {path}: name a folder with a checkpoint, or one file of weights")
    return path.resolve()


def checkpoint_files(path: Path, load_format: LoadFormat = "auto") -> list[Path]:
    """The files that make up a checkpoint; safetensors where there is a choice.

    Args:
        path: a directory, or one file of weights.
        load_format: "safetensors" or "pt" looks for these alone.

    Raises: CheckpointError if there are none, one that an index names is missing, or there are several to choose from.
    """
    if path.is_file():
        return _indexed_files(path) if path.name.endswith(".index.json") else [path]
    files = _safetensors_files(path) if load_format != "pt" else []
    if not files and load_format != "safetensors":
        files = _torch_files(path)
    if not files:
        other = sorted(file.name for pattern in (*_TORCH_PATTERNS, "*.gguf") for file in path.glob(pattern))
        found = f" that can be read here (it has {', '.join(other[:3])})" if other else ""
        expected = {"safetensors": SINGLE_FILE, "pt": TORCH_FILE}.get(load_format, f"{SINGLE_FILE} or {TORCH_FILE}")
        raise CheckpointError(
            f"{path} has no weights{found}: expected {expected}, or shards with an index; "
            "to try the model with random weights, pass --load-format dummy"
        )
    return files


def has_checkpoint(path: Path, load_format: LoadFormat = "auto") -> bool:
    """Whether there are weights at all, readable or not."""
    if path.is_file():
        return True
    names = [file.name for pattern in ("*.safetensors", *_TORCH_PATTERNS) for file in path.glob(pattern)]
    kinds = {"safetensors": (".safetensors",), "pt": (".bin", ".pt", ".pth")}
    suffixes = kinds.get(load_format, (".safetensors", ".bin", ".pt", ".pth"))
    return any(name.endswith(suffixes) and not _NO_WEIGHTS.fullmatch(name) for name in names)


@contextmanager
def open_checkpoint(
    path: Path, *, load_format: LoadFormat = "auto", weight_map: str | Path | None = None
) -> Iterator[dict[str, Any]]:
    """Every tensor of the checkpoint by name: a tensor, or an object that reads one from the mapped file when indexed.

    Args:
        path, load_format: as for `checkpoint_files`.
        weight_map: file with the user's own renamings; default: the one beside the weights, if there is one.

    Raises: CheckpointError if a file is truncated or of another format, or the map does not fit; ConfigError for a map
    that cannot be read.
    """
    found = find_weight_map(path, weight_map)
    with _open_files(path, load_format) as tensors:
        yield tensors if found is None else found.apply(tensors)


def checkpoint_dtype(path: Path, load_format: LoadFormat = "auto") -> torch.dtype | None:
    """Type of the first floating-point tensor of the checkpoint; None if there is no checkpoint or no such tensor."""
    try:
        with _open_files(path, load_format) as tensors:
            return next((dtype for t in tensors.values() if (dtype := _dtype(t)) in _DTYPES.values()), None)
    except CheckpointError:
        return None


@contextmanager
def _open_files(path: Path, load_format: LoadFormat) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in checkpoint_files(path, load_format):
            if file.suffix == ".safetensors":
                opened = stack.enter_context(_open(file))
                tensors |= {name: opened.get_slice(name) for name in list(opened.keys())}
            else:
                tensors |= read_torch_file(file)
        yield tensors


def _safetensors_files(path: Path) -> list[Path]:
    if (index := path / INDEX_FILE).exists():
        return _indexed_files(index)
    return [path / SINGLE_FILE] if (path / SINGLE_FILE).exists() else sorted(path.glob("*.safetensors"))


def _torch_files(path: Path) -> list[Path]:
    if (index := path / TORCH_INDEX_FILE).exists():
        return _indexed_files(index)
    if (path / TORCH_FILE).exists():
        return [path / TORCH_FILE]
    files = sorted(file for pattern in _TORCH_PATTERNS for file in path.glob(pattern))
    files = [file for file in files if not _NO_WEIGHTS.fullmatch(file.name)]
    if len(files) > 1 and not all(_TORCH_SHARD.fullmatch(file.name) for file in files):
        names = ", ".join(file.name for file in files[:4])
        raise CheckpointError(f"{path} has several checkpoints ({names}): say which, with --weights {files[-1]}")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        files = [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"the index {index} cannot be read: {type(exc).__name__}: {exc}") from exc
    if missing := [file.name for file in files if not file.exists()]:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} weight files its index names: "
            f"{', '.join(missing[:4])}; copy or download them again"
        )
    return files


def _dtype(stored: Any) -> torch.dtype | None:
    return stored.dtype if isinstance(stored, Tensor) else _DTYPES.get(stored.get_dtype())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(
            f"{file} is damaged or truncated ({file.stat().st_size:,} bytes): {exc}; copy or download it again"
        ) from exc
