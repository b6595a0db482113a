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
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]  # others may go through the old list
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _execute(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    exec_module(module)
    search = getattr(module, "define_import_structure", None)
    models = Path(str(module.__file__)).parents[1] / "models"
    cache = _cache_of(models)
    if search is None or cache is None:
        return

    def look_up(module_path: Any, *args: Any, **options: Any) -> Any:
        if Path(module_path) not in (models, models / "__init__.py"):
            return search(module_path, *args, **options)
        file = cache / f"{_digest([args, options])}.json"
        with suppress(Exception):
            return _read(file)
        names = search(module_path, *args, **options)
        with suppress(Exception):  # nothing that Transformers may come to return stops it from being imported
            _write(names, file)
        return names

    module.define_import_structure = look_up  # type: ignore[attr-defined]


def _cache_of(models: Path) -> Path | None:
    """The folder for what is found in a folder as it is installed; None if it may change by itself."""
    package = models.parent
    records = list(package.parent.glob(f"{package.name}-*.dist-info/RECORD"))
    try:
        (record,) = (record.stat() for record in records)
        key = [str(models), models.stat().st_mtime_ns, str(records[0]), record.st_mtime_ns, record.st_size]
        return cache_directory() / "transformers" / _digest(key)
    except (OSError, ValueError, RuntimeError):  # of no files, several, or no home
        return None


def _digest(key: Any) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def _read(file: Path) -> Names:
    """Raises whatever comes of a file that is not one of these."""
    names = {
        frozenset(needed): {module: set(classes) for module, classes in modules.items()}
        for needed, modules in json.loads(file.read_bytes())
    }
    if not names[frozenset()]:  # what needs nothing is always there
        raise ValueError(f"{file} is empty")
    return names


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
