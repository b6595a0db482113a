"""Which attributes a module's code reads while it runs: its sizes among them."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from shardwright.plans.sizes import LocalView

_SIZED = (nn.Linear, nn.Embedding, nn.Conv1d)
"""Their sizes are declared where their parameters are cut."""


def changeable_reads(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Watch a module, in place, and note what its code reads.

    Returns: filled while it runs: by module (named from here) and attribute (`config.n_head` for one of an object that
        the module holds), the ints, and lists and tuples of ints, that were read.
    """
    reads: dict[tuple[str, str], Any] = {}
    for name, held in module.named_modules():
        if isinstance(held, _SIZED):
            continue
        for attribute, value in vars(held).items():
            if _is_record(value):
                vars(held)[attribute] = _WatchedView(value, reads, name, attribute)
        held.__class__ = _watched(type(held), reads, name)
    return reads


def read_attribute(module: nn.Module, attribute: str) -> Any:
    """A module's attribute, or one of an object that it holds; None if there is none."""
    value: Any = module
    for name in attribute.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value


class _WatchedView(LocalView):
    """An object as a module sees it, that notes what is read."""

    def __init__(self, original: Any, reads: dict[tuple[str, str], Any], module: str, attribute: str) -> None:
        super().__init__(original)
        object.__setattr__(self, "_note", lambda name, value: _note(reads, module, f"{attribute}.{name}", value))

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        object.__getattribute__(self, "_note")(name, value)
        return value

    def __getitem__(self, name: Any) -> Any:
        value = super().__getitem__(name)
        object.__getattribute__(self, "_note")(name, value)
        return value


def _watched(own: type[nn.Module], reads: dict[tuple[str, str], Any], name: str) -> type[nn.Module]:
    def read(self: nn.Module, attribute: str) -> Any:
        value = own.__getattribute__(self, attribute)
        if not attribute.startswith("__"):
            _note(reads, name, attribute, value)
        return value

    return type(own.__name__, (own,), {"__getattribute__": read, "__module__": own.__module__})


def _note(reads: dict[tuple[str, str], Any], module: str, attribute: str, value: Any) -> None:
    if _is_size(value) or (type(value) in (list, tuple) and value and all(_is_size(item) for item in value)):
        reads.setdefault((module, attribute), value)


def _is_size(value: Any) -> bool:
    return type(value) is int


def _is_record(value: Any) -> bool:
    """Whether a value is an object that may hold sizes: a config, whatever it is called."""
    if isinstance(value, dict):
        return bool(value) and all(isinstance(key, str) for key in value) and any(_is_size(v) for v in value.values())
    is_instance = not isinstance(value, type | nn.Module) and not callable(value) and hasattr(value, "__dict__")
    return (dataclasses.is_dataclass(value) and not isinstance(value, type)) or (
        is_instance and any(_is_size(held) for held in vars(value).values())
    )
