"""What went wrong in code that is not ours, in a part of a line."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

_PACKAGE = Path(__file__).parent
_LIBRARIES = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}


def described(exc: BaseException) -> str:
    """An exception on one line: its type, what it says, and where it was raised."""
    said = " ".join((exc.msg if isinstance(exc, SyntaxError) else str(exc)).split())
    return f"{type(exc).__name__}{f': {said}' if said else ''}{where(exc)}"


def where(exc: BaseException) -> str:
    """File and line where user code raised, as ` (file:line)`; nothing if it was not in a file."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f" ({exc.filename}:{exc.lineno})"
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if not f.filename.startswith("<")]
    outside = [f for f in frames if not Path(f.filename).is_relative_to(_PACKAGE)]
    users = [f for f in outside if not any(Path(f.filename).is_relative_to(library) for library in _LIBRARIES)]
    return f" ({(users or outside)[-1].filename}:{(users or outside)[-1].lineno})" if outside else ""
