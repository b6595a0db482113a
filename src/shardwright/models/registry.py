"""Models that a Python program names itself: `register_model`, then that name wherever a model is asked for.

The names hold in this process and in the engine processes that it starts.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwright.config import check_positive
from shardwright.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Registration:
    """What `register_model` was told."""

    name: str
    factory: Callable[..., Any]
    vocab_size: int | None = None
    max_model_len: int | None = None
    num_layers: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: str | None = None
    weights: Path | None = None
    weight_map: Path | None = None


_registrations: dict[str, Registration] = {}


def register_model(
    name: str,
    factory: Callable[..., Any],
    *,
    vocab_size: int | None = None,
    max_model_len: int | None = None,
    num_layers: int | None = None,
    eos_token_ids: int | Sequence[int] = (),
    tokenizer: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    weight_map: str | os.PathLike[str] | None = None,
) -> None:
    """Let `LLM(name)` and `AsyncLLM(name)` serve what a function returns.

    Args:
        name: to be asked for; a second model of the same name takes the place of the first.
        factory: returns an `nn.Module` whose forward takes token ids [1, T] and gives logits [1, T, vocab]. It is
            called without arguments, or with the folder of the weights if it takes one. `AsyncLLM` calls it in another
            process, so it must be a function that can be imported from there.
        vocab_size: number of token ids; default: found out from the module.
        max_model_len: most tokens of prompt and output together that the module can take; default: found out.
        num_layers: for what `inspect` shows; default: found out.
        eos_token_ids: tokens that end an output, beside those of the tokenizer.
        tokenizer: directory or hub id; default: the folder of the weights, if it has one.
        weights: folder or file with the checkpoint, whose names are the module's; default: the module keeps the weights
            it comes with.
        weight_map: file with renamings for the checkpoint.

    Raises: ConfigError if the name is empty, the factory cannot be called, or a number is below 1.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"register_model: the name is {name!r} but must be a text")
    if not callable(factory):
        raise ConfigError(f"register_model({name!r}): the factory is {factory!r} but must be a function or a class")
    registration = Registration(
        name=name,
        factory=factory,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        num_layers=num_layers,
        eos_token_ids=(eos_token_ids,) if isinstance(eos_token_ids, int) else tuple(eos_token_ids),
        tokenizer=None if tokenizer is None else os.fspath(tokenizer),
        weights=None if weights is None else Path(weights),
        weight_map=None if weight_map is None else Path(weight_map),
    )
    check_positive(registration, "vocab_size", "max_model_len", "num_layers")
    _registrations[name] = registration


def registered(name: str) -> Registration | None:
    """What was registered under a name."""
    return _registrations.get(name)


def registered_names() -> list[str]:
    """All names."""
    return list(_registrations)


def portable(name: str) -> Registration | None:
    """What was registered under a name, if anything, for another process.

    Raises: ConfigError if its factory cannot be found from there.
    """
    registration = registered(name)
    if registration is None:
        return None
    try:
        pickle.dumps(registration)
        if registration.factory.__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
            raise AttributeError("this session has no file to import it from")
    except Exception as exc:  # whatever the factory is
        raise ConfigError(
            f"the factory of {name!r} cannot be called in the engine's own process ({exc}): define it at the top of a "
            "file, or serve it with LLM, which stays in this one"
        ) from exc
    return registration


def adopt(registration: Registration | None) -> None:
    """Take over what another process registered."""
    if registration is not None:
        _registrations[registration.name] = registration
