"""What code keeps from one forward pass to the next, put back as it was.

Authors keep what costs time to make: rotary angles for as many tokens as came last, masks by length in a dict or behind
`lru_cache`, tables that grow with the prompt. All of that is right for the pass that made it, and may not be for the
next: a pass that is only watched may run on "meta", and one that serves is of the tokens of many requests.

Looked at are attributes of modules and of plain objects that they hold, of their classes, and the globals of the files
that these are defined in. Not covered: tensors that are written into.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

_LIBRARIES = {"torch", "transformers", "builtins", "numpy", "shardwright"}
"""Packages whose own state is left alone."""

_CONTAINERS = (dict, list, OrderedDict, defaultdict)

_NOTHING = object()
_CACHED = type(lru_cache(lambda: None))


class _Namespace:
    """Names and what they stood for: attributes, or globals."""

    def __init__(self, owner: Any, *, is_shared: bool = False) -> None:
        self._owner = owner
        self._is_shared = is_shared
        """Others than the model's code may use it: only what can be a memory of tensors is looked at."""
        self._names: set[str] | None = None
        self.kept = {name: value for name, value in vars(owner).items() if self._matters(value)}

    def only_changed(self) -> bool:
        """From now on, mind only what has changed by now. Returns: whether anything has."""
        self._names = {name for name, _ in self._changes()}
        return bool(self._names)

    def restore(self) -> None:
        for name, old in list(self._changes()):
            if isinstance(self._owner, type):  # whose dict is not to be written into
                delattr(self._owner, name) if old is _NOTHING else setattr(self._owner, name, old)
            elif old is _NOTHING:
                del vars(self._owner)[name]
            else:
                vars(self._owner)[name] = old

    def _changes(self) -> Iterator[tuple[str, Any]]:
        """Names that stand for something else now, and what they stood for."""
        now = vars(self._owner)
        for name in now.keys() | self.kept.keys() if self._names is None else self._names:
            old, new = self.kept.get(name, _NOTHING), now.get(name, _NOTHING)
            if old is not new and self._matters(new) and (old is not _NOTHING or not self._is_shared or _is_data(new)):
                yield name, old

    def _matters(self, value: Any) -> bool:
        return not self._is_shared or value is None or _is_data(value)


class _Container:
    """What a dict or a list held."""

    def __init__(self, held: dict[Any, Any] | list[Any]) -> None:
        self._held = held
        self._kept = held.copy()

    def only_changed(self) -> bool:
        """Returns: whether it holds something else now."""
        held, kept = (list(c.values()) if isinstance(c, dict) else c for c in (self._held, self._kept))
        return len(held) != len(kept) or any(one is not other for one, other in zip(held, kept, strict=True))

    def restore(self) -> None:
        if isinstance(self._held, dict):
            self._held.clear()
            self._held.update(self._kept)
        else:
            self._held[:] = self._kept


class _Cache:
    """A function behind `lru_cache`."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def only_changed(self) -> bool:
        """Returns: whether it has been called."""
        return bool(self._function.cache_info().currsize)

    def restore(self) -> None:
        self._function.cache_clear()


class Remembered:
    """All that a module's code keeps, as it is when this is made.

    Args:
        module: best one that has not run yet.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept: list[_Namespace | _Container | _Cache] = []
        self._seen: set[int] = set()
        for owner in module.modules():
            if _is_own(type(owner)):
                self._keep_names(owner, depth=2)
        kinds = _own_classes(module)
        for kind in kinds:
            self._keep_names(kind, depth=1)
        for file in _files_of(kinds):
            self._keep_names(file, depth=1)

    def restore(self) -> None:
        """Put everything back. What was computed in between is lost, and will be computed again."""
        for kept in self._kept:
            kept.restore()

    def only_changed(self) -> None:
        """From now on, mind only what has changed by now."""
        self._kept = [kept for kept in self._kept if kept.only_changed()]

    def _keep_names(self, owner: Any, *, depth: int) -> None:
        if id(owner) in self._seen:
            return
        self._seen.add(id(owner))
        self._kept.append(namespace := _Namespace(owner, is_shared=isinstance(owner, ModuleType)))
        values = vars(owner) if isinstance(owner, ModuleType) else namespace.kept
        for name, value in list(values.items()):
            if name not in ("_parameters", "_modules"):  # which only loading and adapting change
                self._keep_value(value, depth=depth)

    def _keep_value(self, value: Any, *, depth: int) -> None:
        if type(value) in _CONTAINERS:
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._kept.append(_Container(value))
        elif isinstance(value, _CACHED):
            self._kept.append(_Cache(value))
        elif isinstance(value, FunctionType):
            for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                if type(default) in _CONTAINERS:
                    self._keep_value(default, depth=0)
        elif depth and _is_plain_object(value):
            self._keep_names(value, depth=depth - 1)


def global_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Tensors among the globals of the files that a module's code is in."""
    for file in _files_of(_own_classes(module)):
        yield from (value for value in vars(file).values() if isinstance(value, Tensor))


def _own_classes(module: nn.Module) -> set[type]:
    return {kind for owner in module.modules() for kind in type(owner).__mro__ if _is_own(kind)}


def _files_of(kinds: set[type]) -> list[ModuleType]:
    """Modules in which classes are defined, and the functions that these files use; none of a library."""
    names = {kind.__module__ for kind in kinds if kind.__module__ in sys.modules}
    for name in list(names):
        values = vars(sys.modules[name]).values()
        names |= {value.__module__ for value in values if isinstance(value, FunctionType) and value.__module__}
    own = (name for name in sorted(names) if name.partition(".")[0] not in _LIBRARIES | sys.stdlib_module_names)
    return [sys.modules[name] for name in own if name in sys.modules]


def _is_own(kind: type) -> bool:
    """Whether a class is the author's."""
    return kind.__module__.partition(".")[0] not in _LIBRARIES


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a class of the author's that is no module."""
    is_code = isinstance(value, (nn.Module, type, ModuleType))
    return not is_code and _is_own(type(value)) and hasattr(value, "__dict__")


def _is_data(value: Any) -> bool:
    """Whether a value may hold tensors, and is no code."""
    return isinstance(value, (Tensor, dict, list, tuple))
