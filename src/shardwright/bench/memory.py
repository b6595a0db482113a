"""The most memory that a process has held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_rss_mib(pid: int | None = None) -> float:
    """Peak resident memory of a process, this one by default, in MiB; 0 for another one where the system does not tell.

    Linux's VmHWM, since `getrusage` starts a process at what its parent held when it was forked.
    """
    status = Path(f"/proc/{pid or 'self'}/status")
    try:
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return round(int(fields["VmHWM"].split()[0]) / 1024, 1)
    except (OSError, KeyError):
        if pid is not None:
            return 0.0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 1024), 1)
