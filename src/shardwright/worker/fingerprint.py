"""A short name for the content of a model's files: ranks on several machines must read the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE_BYTES = 1 << 20
"""Larger files are told apart by their sizes and ends: weights take long to read, and begin with their names."""


SUFFIXES = {".json", ".py", ".yaml", ".safetensors", ".bin", ".pt", ".pth", ".gguf"}
"""Of files that say what a model computes."""


def fingerprint(*paths: str | Path | None) -> str:
    """Of the files in directories, or of single files; None stands for nothing."""
    digest = hashlib.sha256()
    for path in [Path(path) for path in paths if path is not None]:
        files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}\n".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(WHOLE_BYTES))
                if size > 2 * WHOLE_BYTES:
                    opened.seek(-WHOLE_BYTES, 2)
                digest.update(opened.read(WHOLE_BYTES))
    return digest.hexdigest()[:16]
