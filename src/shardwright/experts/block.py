"""A block of experts as it is served, in the place of the user's module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.adapt.stand_in import StandIn
from shardwright.errors import UnsupportedModelError
from shardwright.experts.program import Program
from shardwright.layers.parallel import combined
from shardwright.layers.parallel_module import Parallel


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How a model calls its block: with one tensor of tokens, and what is always the same."""

    values: tuple[Any, ...]
    """Arguments, positional ones first; None in the place of the tensor."""
    names: tuple[str, ...]
    """Of the last of them, which are given by name."""
    place: int
    """Of the tensor."""
    num_dims: int
    """Of the tensor."""

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any]) -> BlockCall:
        """Raises UnsupportedModelError if it is called in another way."""
        values = [*args, *kwargs.values()]
        tensors = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        if len(tensors) != 1 or not all(v is None or isinstance(v, bool | int | float | str | Tensor) for v in values):
            raise UnsupportedModelError("it is called with more than its tokens")
        tokens = values[tensors[0]]
        if not tokens.is_floating_point() or tokens.ndim not in (2, 3):
            raise UnsupportedModelError("it is not called with a row of numbers for each token")
        values[tensors[0]] = None
        return cls(tuple(values), tuple(kwargs), tensors[0], tokens.ndim)

    def input(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
        """The tokens of another call, if it is one like this."""
        values = [*args, *kwargs.values()]
        if len(values) != len(self.values) or tuple(kwargs) != self.names:
            return None
        tokens = values[self.place]
        is_like = isinstance(tokens, Tensor) and tokens.ndim == self.num_dims
        others = zip(values, self.values, strict=True)
        is_like = is_like and all(v is own or v == own for i, (v, own) in enumerate(others) if i != self.place)
        return tokens if is_like else None

    def make(self, forward: Callable[..., Any], tokens: Tensor) -> Any:
        """Call a function as the model calls the block."""
        values = [*self.values[: self.place], tokens, *self.values[self.place + 1 :]]
        first = len(values) - len(self.names)
        return forward(*values[:first], **dict(zip(self.names, values[first:], strict=True)))


class GroupedExperts(nn.Module):
    """In front of a block's own class: its experts all at once, if it is called as it was when it was watched."""

    experts_program: Program
    experts_call: BlockCall
    experts_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        tokens = self.experts_call.input(args, kwargs)
        if isinstance(tokens, StandIn):
            return self.experts_program.blank(tokens)
        is_known = type(tokens) is Tensor and tokens.dtype is self.experts_dtype and not tokens.is_meta
        if tokens is None or not is_known or not tokens.numel():
            return super().forward(*args, **kwargs)
        return self.experts_program.run(tokens)


def own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that is the user's, behind parts of ours."""
    return own_class(kind.__bases__[-1]) if issubclass(kind, Parallel) else kind


def group(block: nn.Module, program: Program, call: BlockCall, dtype: torch.dtype) -> None:
    """Let a block compute its experts all at once; what it does beside its own forward pass stays around it.

    All that is new is in its class: what a module keeps in itself may be put back to what it was (adapt/remembered.py).
    """
    values = {"experts_program": program, "experts_call": call, "experts_dtype": dtype}
    block.__class__ = _grouped_class(type(block), values)


def ungroup(block: nn.Module) -> None:
    """Let a block run as it is written."""
    block.__class__ = _plain_class(type(block))


def _grouped_class(kind: type[nn.Module], values: dict[str, Any]) -> type[nn.Module]:
    """A class of one block."""
    if issubclass(kind, Parallel):
        *parts, last = kind.__bases__
        return type(kind.__name__, (*parts, _grouped_class(last, values)), {"__module__": kind.__module__})
    return type(f"Grouped{kind.__name__}", (GroupedExperts, kind), {"__module__": kind.__module__, **values})


def _plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    if issubclass(kind, Parallel):
        *parts, last = kind.__bases__
        return combined((*parts, _plain_class(last)))
    return kind.__bases__[-1]
