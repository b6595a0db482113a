"""Threads that do what nobody waits for yet."""

from __future__ import annotations

import os
import sys
import threading

LEAST_PRIORITY = 19
"""As `nice` counts."""


def give_way() -> None:
    """Let others come before the calling thread and the processes that it starts, where priorities are threads' own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)
