"""Checkpoints that torch.save wrote: read without running any code from them, memory-mapped where the format allows it.

Training scripts save a state dict alone or put it under some name beside optimizer and counters; it is looked for under
the usual names. Not covered: pickled modules, which are code.
"""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import CheckpointError

logger = logging.getLogger(__name__)

NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
"""Names under which training scripts put the model's state dict, in the order in which they are tried."""

_ZIP_MAGIC = b"PK\x03\x04"
_REFUSED = re.compile(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)")


def read_torch_file(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file's state dict by name, on the CPU.

    Raises: CheckpointError if the file is damaged, holds more than tensors and plain values, or has no state dict.
    """
    return _state_dict(_load(file), file)


def _load(file: Path) -> Any:
    try:
        with file.open("rb") as opened:
            is_zip = opened.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)  # the old format can't be mapped
    except Exception as exc:  # readers of two formats, each with errors of its own
        if isinstance(exc, pickle.UnpicklingError) and (refused := _REFUSED.search(str(exc))):
            raise CheckpointError(
                f"{file} holds an object of {refused[1]}, and reading it would run code: "
                "save the weights alone, torch.save(model.state_dict(), ...)"
            ) from exc
        reason = (str(exc).splitlines() or [""])[0][:120].strip()
        raise CheckpointError(
            f"{file} is damaged, truncated or no checkpoint of torch.save ({_size(file)}): "
            f"{type(exc).__name__}{f': {reason}' if reason else ''}; copy or download it again"
        ) from exc


def _state_dict(content: Any, file: Path, where: str = "") -> dict[str, Tensor]:
    if isinstance(content, dict):
        for name in NESTED:
            inner = content.get(name)
            if isinstance(inner, dict) and _has_tensors(inner):
                return _state_dict(inner, file, f"{where}[{name!r}]")
        if tensors := {name: t for name, t in content.items() if isinstance(t, Tensor) and isinstance(name, str)}:
            if where:
                logger.info("%s: weights are those in its %s", file, where)
            return tensors
    held = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
    raise CheckpointError(
        f"{file} has no state dict: it holds {held or 'nothing'}, and weights are looked for at its top and under "
        f"{', '.join(NESTED)}"
    )


def _has_tensors(content: dict[Any, Any]) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, dict) and _has_tensors(v)) for v in content.values())


def _size(file: Path) -> str:
    try:
        return f"{file.stat().st_size:,} bytes"
    except OSError:
        return "which cannot be read"
