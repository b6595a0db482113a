"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where what can be made or fetched again is kept: SHARDWRIGHT_CACHE, or `shardwright` in the user's cache
    directory.
    """
    if own := os.environ.get("SHARDWRIGHT_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "shardwright"
