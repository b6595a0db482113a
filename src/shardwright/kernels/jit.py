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
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
    "-fvisibility=hidden",
    "-fopenmp",
)
COMPILE_TIMEOUT_S = 120

_lock = Lock()
"""What one thread has compiled, no other compiles beside it."""


def native_library() -> ctypes.CDLL | None:
    """What `native/*.cpp` offer, in one library; None, with one warning, if it cannot be had here."""
    with _lock:
        return _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    sources = {path.stem: path.read_bytes() for path in sorted(SOURCES.glob("*.cpp"))}
    return _library("kernels", sources, timeout_s=COMPILE_TIMEOUT_S)


def generated_library(name: str, source: str) -> ctypes.CDLL | None:
    """Source that was written for one model, compiled; None, with one warning, if it cannot be had here.

    Args:
        name: what the file is called, for people.
        source: C++, which may include what lies in `native/`.
    """
    return _library(name, {name: source.encode()}, timeout_s=None)  # nobody waits, and others may have the cores


def compile_ahead() -> None:
    """Have kernels compiled while the caller goes on; of use where they have not been yet."""
    Thread(target=native_library, name="compile-kernels", daemon=True).start()


def _library(name: str, sources: Mapping[str, bytes], *, timeout_s: float | None) -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.warning("no C++ compiler found: native kernels are off, some steps are slower; install g++ to have them")
        return None
    try:
        return ctypes.CDLL(str(_compiled(name, sources, compiler, timeout_s)))
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


def _compiled(name: str, sources: Mapping[str, bytes], compiler: str, timeout_s: float | None) -> Path:
    """The shared library of some sources, by their names, compiled unless the cache has it.

    Raises: OSError or SubprocessError.
    """
    headers = [header.read_bytes() for header in sorted(SOURCES.glob("*.h"))]
    identity = b"\0".join([*sources.values(), *headers, _version(compiler), *map(str.encode, (*FLAGS, _processor()))])
    directory = cache_directory() / "kernels"
    library = directory / f"{name}-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        compiles, objects = [], []
        for own, text in sources.items():
            written, compiled = (str(Path(temporary) / f"{own}.{ending}") for ending in ("cpp", "o"))
            Path(written).write_bytes(text)
            compiles.append([compiler, *FLAGS, "-I", str(SOURCES), "-c", written, "-o", compiled])
            objects.append(compiled)
        linked = Path(temporary) / "linked.so"
        _run_side_by_side(compiles, timeout_s)
        _run_side_by_side([[compiler, "-shared", *objects, "-o", str(linked), *_openmp_flags()]], timeout_s)
        linked.replace(library)  # atomic: another process may do the same
    return library


def _run_side_by_side(commands: Sequence[Sequence[str]], timeout_s: float | None) -> None:
    """Run commands until all have ended well. Raises OSError or SubprocessError for one that has not; the rest end."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with ExitStack() as stack:
        processes = []
        for command in commands:
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
            stack.callback(process.kill)  # which does nothing to one that has ended
            processes.append(process)
        for process, command in zip(processes, commands, strict=True):
            _, said = process.communicate(timeout=None if deadline is None else deadline - time.monotonic())
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=said)


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
