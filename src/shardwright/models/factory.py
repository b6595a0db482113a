"""Functions that make a model: found by name, called with what they take, their answer checked.

Two conventions. `package.module:function` names one outright (a class will do). A folder with a factory.py has
`build_model(folder)` in it. Either returns an `nn.Module`, or a pair of one and a dict of what cannot be seen from it.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwright.errors import ModelSourceError, UnsupportedModelError
from shardwright.foreign_errors import described
from shardwright.models.resolve import FACTORY_FILE
from shardwright.models.user_code import import_file, import_named, importing_from

logger = logging.getLogger(__name__)

FUNCTION = "build_model"
"""What a factory.py must define."""

INFO_KEYS = ("vocab_size", "max_model_len", "num_layers", "eos_token_ids", "has_weights")
"""What the dict beside a module may hold. `has_weights`: the module is filled already, no checkpoint is to be read."""

_FOLDER_NAMES = re.compile(r"(?:\w+_)?(?:path|folder|dir|directory|checkpoint|ckpt|weights|root)(?:_\w+)?")
"""Parameters that ask for the folder of the weights."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a factory returned."""

    module: nn.Module
    info: dict[str, Any] = field(default_factory=dict)
    """What it said of the module."""
    is_filled: bool = False
    """The module has its weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factory:
    """A function that makes a module."""

    label: str
    """How messages speak of it."""
    function: Callable[..., Any]
    folder: Path | None = None
    """For a function that takes one."""
    takes_folder: bool = False
    """Its one argument is the folder, whatever it is called."""
    code: Path | None = None
    """Folder from which its code imports."""

    def __call__(self) -> Made:
        """Call the function.

        Raises: ModelSourceError if it takes something else; UnsupportedModelError if it fails or returns no module.
        """
        positional, named = self._arguments()
        dtype = torch.get_default_dtype()
        try:
            with importing_from(self.code) if self.code is not None else nullcontext():
                returned = self.function(*positional, **named)
        except (Exception, SystemExit) as exc:
            raise UnsupportedModelError(f"{self.label} failed: {described(exc)}") from exc
        finally:
            torch.set_default_dtype(dtype)  # which some factories change, for themselves as they think
        return self._checked(returned)

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):  # functions in C have none
            return [], {}
        single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        required = [p for p in single if p.default is p.empty]
        for_folder = next((p for p in single if _FOLDER_NAMES.fullmatch(p.name.lower())), None)
        if for_folder is None and self.takes_folder:
            for_folder = next(iter(required or [p for p in parameters if p.kind is p.VAR_POSITIONAL]), None)
        if others := [p.name for p in required if p is not for_folder]:
            raise ModelSourceError(
                f"{self.label} needs {', '.join(others)}, which nobody gives it: let it take nothing, or the folder of "
                "the weights alone, e.g. by a function around it"
            )
        if for_folder is None or (self.folder is None and for_folder not in required):
            return [], {}
        if self.folder is None:
            raise ModelSourceError(
                f"{self.label} takes {for_folder.name}: name the folder of its weights with --weights"
            )
        by_name = for_folder.kind in (for_folder.POSITIONAL_OR_KEYWORD, for_folder.KEYWORD_ONLY)
        return ([], {for_folder.name: str(self.folder)}) if by_name else ([str(self.folder)], {})

    def _checked(self, returned: Any) -> Made:
        is_pair = isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)
        module, info = returned if is_pair else (returned, {})
        if inner := getattr(module, "_orig_mod", None):
            logger.info("%s returned a compiled module: what it was compiled from is served", self.label)
            module = inner
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        if not isinstance(module, nn.Module):
            what = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(returned).__name__}"
            raise UnsupportedModelError(
                f"{self.label} returned {what}, but must return an nn.Module, or a pair of one and a dict"
            )
        if unknown := [key for key in info if key not in INFO_KEYS]:
            near = difflib.get_close_matches(str(unknown[0]), INFO_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(INFO_KEYS)}"
            raise UnsupportedModelError(f"{self.label} returned a dict with the unknown key {unknown[0]!r}: {hint}")
        return Made(module, info)


def named_factory(reference: str, folder: Path | None = None) -> Factory:
    """The factory `package.module:function`.

    Args:
        reference: in that form; the function may be an attribute of an attribute.
        folder: of the weights, if there is one.

    Raises: ModelSourceError if there is no such module or function, or its code cannot be imported.
    """
    name, _, attributes = reference.partition(":")
    return Factory(label=reference, function=_attribute(import_named(name), attributes, name), folder=folder)


def folder_factory(folder: Path) -> Factory:
    """The factory of a folder with a factory.py, whose code runs.

    Raises: ModelSourceError if it cannot be imported, or has no `build_model`.
    """
    file = folder / FACTORY_FILE
    function = _attribute(import_file(file), FUNCTION, str(file))
    return Factory(label=f"{file}:{FUNCTION}", function=function, folder=folder, takes_folder=True, code=folder)


def _attribute(module: Any, path: str, where: str) -> Callable[..., Any]:
    found = module
    for part in path.split("."):
        if not hasattr(found, part):
            callables = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            near = difflib.get_close_matches(part, callables, n=1)
            own = [name for name in callables if getattr(vars(found)[name], "__module__", "") == module.__name__]
            hint = f"did you mean {near[0]}?" if near else f"it defines {', '.join(own) or 'none'}"
            raise ModelSourceError(f"{where} has no function {path}: {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ModelSourceError(f"{where}: {path} is a {type(found).__name__}, not a function that returns a module")
    function: Callable[..., Any] = found
    return function
