"""Native kernels, compiled for this machine when first needed and kept in the user's cache directory.

A library's name is a hash of its source, the compiler and the processor, so that nothing stale is ever loaded. It is
linked against the OpenMP runtime that torch brings: two runtimes in one process would fight for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from threading import Lock, Thread

from shardwright.paths import cache_directory

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
# Loops begin at a cache line: measured, a tile of products takes 3 % less (Zen 3).
FLAGS = (
    "-O3",
    "-falign-loops=64",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # numbers are those that the source says, whatever stands beside it
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
)
COMPILE_TIMEOUT_S = 120

_locks: defaultdict[str, Lock] = defaultdict(Lock)
"""By library, and by compiler: what one thread is about to know, no other asks a second time."""


def native_library(name: str) -> ctypes.CDLL | None:
    """The compiled `native/<name>.cpp`; None, with one warning, if it cannot be had here.

    Args:
        name: of the source file, without its ending.
    """
    with _locks[name]:
        return _loaded(name)


def generated_library(name: str, source: str) -> ctypes.CDLL | None:
    """Source that was written for one model, compiled; None, with one warning, if it cannot be had here.

    Args:
        name: what the file is called, for people.
        source: C++, which may include what lies in `native/`.
    """
    with _locks[name]:
        return _library(name, source.encode(), timeout_s=None)  # nobody waits, and others may have the cores


def compile_ahead() -> None:
    """Have all libraries compiled, side by side, while the caller goes on; of use where they have not been yet."""
    for source in sorted(SOURCES.glob("*.cpp")):
        Thread(target=native_library, args=(source.stem,), name=f"compile-{source.stem}", daemon=True).start()


@functools.cache
def _loaded(name: str) -> ctypes.CDLL | None:
    return _library(name, (SOURCES / f"{name}.cpp").read_bytes(), timeout_s=COMPILE_TIMEOUT_S)


def _library(name: str, source: bytes, *, timeout_s: float | None) -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.warning("no C++ compiler found: native kernels are off, some steps are slower; install g++ to have them")
        return None
    try:
        return ctypes.CDLL(str(_compiled(name, source, compiler, timeout_s)))
    except (OSError, subprocess.SubprocessError) as exc:
        logger.warning("native %s cannot be compiled, some steps are slower: %s", name, _cause(exc))
        return None


def _cause(error: OSError | subprocess.SubprocessError) -> str:
    """One line: of what a compiler says, the first that tells an error."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error) or type(error).__name__
    said: str = error.stderr.decode(errors="replace").strip() or str(error)
    lines = said.splitlines()
    return next((line for line in lines if "error:" in line), lines[0])


def _compiled(name: str, source: bytes, compiler: str, timeout_s: float | None) -> Path:
    """The shared library of a source, compiled unless the cache has it. Raises OSError or SubprocessError."""
    sources = [source, *(header.read_bytes() for header in sorted(SOURCES.glob("*.h")))]
    with _locks[compiler]:
        version = _version(compiler)  # a process: started once, for all
    identity = b"\0".join([*sources, version, " ".join(FLAGS).encode(), _processor().encode()])
    directory = cache_directory() / "kernels"
    library = directory / f"{name}-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        written, compiled, linked = (Path(temporary) / f"kernel.{ending}" for ending in ("cpp", "o", "so"))
        written.write_bytes(source)
        for command in (
            [compiler, *FLAGS, "-I", str(SOURCES), "-c", str(written), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked), *_openmp_flags()],
        ):
            subprocess.run(command, capture_output=True, check=True, timeout=timeout_s)
        linked.replace(library)  # atomic: another process may do the same
    return library


def _openmp_flags() -> list[str]:
    """Link flags for torch's own OpenMP runtime, or the compiler's if torch brings none."""
    import torch

    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(libraries[0]), f"-Wl,-rpath,{libraries[0].parent}"] if libraries else ["-fopenmp"]


@functools.cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S).stdout


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
