"""Which of Transformers' files has which class, remembered: it reads 2,000 of them whenever it is imported."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from shardwright.paths import cache_directory

_SEARCHES = "transformers.utils.import_utils"

Names: TypeAlias = dict[frozenset[str], dict[str, set[str]]]
"""Classes by module, by what has to be installed for them."""


def remember_model_names() -> None:
    """Let Transformers, which is not imported yet, keep in the user's cache what it finds, and look there next time.

    Only where an installer put it: files that somebody is working on are read each time. Where it comes to be built
    otherwise, it searches as it always did.
    """
    if "transformers" not in sys.modules and not any(isinstance(finder, _Exchange) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Exchange())


class _Exchange(MetaPathFinder):
    """Finds the module that searches, once, and exchanges its function when it has been executed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As MetaPathFinder has it."""
        if name != _SEARCHES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _execute(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    exec_module(module)
    search = getattr(module, "define_import_structure", None)
    package = Path(str(module.__file__)).parents[1]
    installed = next(package.parent.glob(f"{package.name}-*.dist-info/RECORD"), None)
    if search is None or installed is None:
        return
    seen = installed.stat()
    key = [str(installed), seen.st_mtime_ns, seen.st_size]

    def look_up(module_path: Any, prefix: str | None = None) -> Names:
        if Path(module_path) != package / "models":
            return search(module_path, prefix=prefix)  # type: ignore[no-any-return]
        digest = hashlib.sha256(json.dumps([*key, prefix]).encode()).hexdigest()
        file = cache_directory() / "transformers" / f"{digest[:16]}.json"
        with suppress(OSError, ValueError, TypeError):
            return _read(file)
        names: Names = search(module_path, prefix=prefix)
        with suppress(OSError):
            _write(names, file)
        return names

    module.define_import_structure = look_up  # type: ignore[attr-defined]


def _read(file: Path) -> Names:
    return {
        frozenset(needed): {module: set(classes) for module, classes in modules.items()}
        for needed, modules in json.loads(file.read_bytes())
    }


def _write(names: Names, file: Path) -> None:
    listed = [
        [sorted(needed), {module: sorted(classes) for module, classes in modules.items()}]
        for needed, modules in names.items()
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps(listed))
        temporary.replace(file)  # atomic: another process may do the same
    finally:
        temporary.unlink(missing_ok=True)
