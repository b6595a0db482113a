"""Files in the page cache: taken out of it as far as a user may, and how much is in it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)


def evict(files: Iterable[Path]) -> None:
    """Let go of the clean pages of files. Those that a running process has mapped stay."""
    os.sync()  # what is not written yet stays as well
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident_share(files: Iterable[Path]) -> float:
    """Of all bytes of files, the share that is in the page cache, from 0 to 1, in whole pages."""
    resident = total = 0
    for file in files:
        pages = resident_pages(file)
        resident, total = resident + sum(pages), total + len(pages)
    return resident / total if total else 0.0


def resident_pages(file: Path) -> list[int]:
    """For each page of a file, 1 if it is in memory, else 0; nothing for a file that is empty or cannot be read."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if not size:
                return []
            with mmap.mmap(
                opened.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            ) as view:
                return mincore(view, size)
    except OSError:
        return []


def mincore(view: mmap.mmap, size: int) -> list[int]:
    """The system call of this name, over a mapping. Raises OSError."""
    states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    first = ctypes.c_char.from_buffer(view)  # a mapping has an address for writable views alone
    try:
        if _libc.mincore(ctypes.byref(first), ctypes.c_size_t(size), states):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        del first
    return [state & 1 for state in states]
