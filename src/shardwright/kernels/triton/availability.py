"""Whether Triton kernels can run here: compiled on a GPU, or on a CPU by Triton's interpreter, which is for tests."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_interpreted() -> bool:
    """Whether kernels are carried out on the host, in numpy: TRITON_INTERPRET=1 since before Triton was imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on tensors of this device and type; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'shardwright[cuda]'"
    if dtype not in _TYPES:
        return f"there are no Triton kernels for {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        return None if _has_compiler() else "Triton needs a C compiler for its launchers: install gcc, or set CC"
    if device.type == "cpu" and is_interpreted():
        return None
    return f"Triton does not compile for {device.type}; TRITON_INTERPRET=1 interprets its kernels, slowly, for tests"


def _has_compiler() -> bool:
    """Whether there is one where Triton looks for it."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
