"""Threads of torch's operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """While open, operators on the CPU use one thread.

    For passes of a few tokens at start: there is little to share out, and where other processes keep the cores busy
    each of thousands of small operators would wait for its slowest thread.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
