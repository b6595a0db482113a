"""Import code that the user wrote, and say in one line what goes wrong in it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from shardwright.errors import ModelSourceError
from shardwright.foreign_errors import described, where


def import_named(name: str) -> ModuleType:
    """Import `package.module`, installed or from the current directory, as `python -m` would.

    Raises: ModelSourceError if there is none of the name, or its code fails.
    """
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as exc:
        if isinstance(exc, ModuleNotFoundError) and exc.name and f"{name}.".startswith(f"{exc.name}."):
            raise ModelSourceError(_no_module(name, exc.name, directory)) from exc
        raise ModelSourceError(_import_failed(name, exc)) from exc


def import_file(file: Path) -> ModuleType:
    """Import a file that may import others beside it.

    Raises: ModelSourceError if its code fails.
    """
    name = f"shardwright_factory_{sha256(str(file).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with importing_from(file.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        del sys.modules[name]
        raise ModelSourceError(_import_failed(str(file), exc)) from exc
    return module


_owners: dict[str, Path] = {}
"""Folder of every module that was imported from beside a factory."""


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """While open, code imports from this folder first; what another folder calls the same does not get in the way."""
    for name in [name for name, owner in _owners.items() if owner != folder]:
        sys.modules.pop(name, None)
        del _owners[name]
    importlib.invalidate_caches()
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in sys.modules.keys() - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and Path(origin).is_relative_to(folder):
                _owners[name] = folder


def _import_failed(name: str, exc: BaseException) -> str:
    if isinstance(exc, ModuleNotFoundError) and exc.name:
        package = exc.name.partition(".")[0]
        return f"{name} needs the package {package!r}, which is not installed{where(exc)}: pip install {package}"
    return f"importing {name} fails: {described(exc)}"


def _no_module(name: str, missing: str, directory: str) -> str:
    """For a module that is nowhere, with the nearest name beside it."""
    package, _, leaf = missing.rpartition(".")
    paths = getattr(sys.modules.get(package), "__path__", None) if package else [directory]
    beside = [module.name for module in pkgutil.iter_modules(paths or [])]
    place = f"in the package {package}" if package else f"in {directory}, nor is it installed"
    near = difflib.get_close_matches(leaf, beside, n=1)
    rest = name.removeprefix(missing)
    hint = f": did you mean {package + '.' if package else ''}{near[0]}{rest}?" if near else ""
    return f"there is no module {missing!r} {place}{hint}"
