"""Recorded calls, carried out by PyTorch for one number of tokens.

Tensors are told by storages, as they were seen: a view is made where it is read, writes in place reach all views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright.replay.affine import Affine, Call, Place, tensors_in
from shardwright.replay.trace import mapped


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of a step: where it lies and how."""

    storage: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, place: Place, num_tokens: int) -> View:
        sizes, strides, offset = place.at(num_tokens)
        return cls(place.storage, place.dtype, tuple(sizes), tuple(strides), offset)


@dataclass(frozen=True, slots=True)
class Step:
    """A call for a number of tokens; tensors in it are View, or Tensor if they are always the same."""

    number: int
    """Of the call."""
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[View]


Storages = dict[int, tuple[Tensor, View]]
"""A tensor of each storage, and what it was called when it was recorded."""


class Steps:
    """Calls for one number of tokens.

    Args:
        calls: of a recording.
        num_tokens: to which sizes belong.
        constants: tensors that are there before.
    """

    def __init__(self, calls: Sequence[Call], num_tokens: int, constants: Mapping[Place, Tensor]) -> None:
        self.num_tokens = num_tokens

        def bound(tree: Any) -> Any:
            tree = mapped(tree, Place, lambda p: constants[p] if p in constants else View.of(p, num_tokens))
            return mapped(tree, Affine, lambda a: a.at(num_tokens))

        self._steps = [
            Step(number, call.function, bound(call.args), bound(call.kwargs), tensors_in(bound(call.output), View))
            for number, call in enumerate(calls)
        ]

    def run(self, storages: Storages, carry_out: Callable[[Step, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        """Carry the calls out.

        Args:
            storages: those of the inputs; gets those of all outputs.
            carry_out: carries out one call, with tensors in its arguments.
        """

        def tensor(view: View) -> Tensor:
            return viewed(view, storages)

        for step in self._steps:
            results = carry_out(step, mapped(step.args, View, tensor), mapped(step.kwargs, View, tensor))
            for view, result in zip(step.outputs, tensors_in(results, Tensor), strict=True):
                if view.storage not in storages:
                    storages[view.storage] = result, view


def viewed(view: View, storages: Storages) -> Tensor:
    """A view of one of the storages."""
    tensor, seen = storages[view.storage]
    if view == seen:
        return tensor
    return tensor.as_strided(view.sizes, view.strides, tensor.storage_offset() + view.offset - seen.offset)
