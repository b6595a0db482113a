"""What is known of a module that runs its own attention: its arguments, what it keeps of tokens, its results.

A module is called once for each request of a step, so it has to be known how its arguments are taken apart, and its
results put together. This is read off two calls of different lengths, the second of which goes on from the first, and
a third of two sequences: dimensions that differ count tokens, the context, or sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from transformers.cache_utils import Cache

from shardwright.adapt.token_rows import TokenTensor
from shardwright.cache.spec import LayerSpec, Visibility

Path = tuple[Any, ...]
"""To a value inside nested arguments or results."""


class Role(Enum):
    """What an argument is to one request."""

    CACHE = "cache"
    MASK = "mask"
    TOKENS = "tokens"
    """It has a place for each new token."""
    CONTEXT = "context"
    """It has a place for each token of the context, so what earlier calls got of it has to be kept."""
    ITSELF = "itself"
    """The same for all requests."""


@dataclass(frozen=True, slots=True)
class Part:
    """An argument or a result, or what is inside one."""

    role: Role
    token_dim: int = 0
    batch_dim: int | None = None
    """None if it has none, or more than one."""
    depends_on_context: bool = False
    """Whether something else in its shape grows with the context: it cannot be shared by requests."""
    visibility: Visibility | None = None
    """Of a mask."""
    kept: TokenTensor | None = None
    """What is kept of a context."""


@dataclass(frozen=True, slots=True)
class Write:
    """One call by which a module hands its cache what it keeps of the new tokens, and gets that of the context."""

    method: str
    tensors: tuple[TokenTensor, ...]


@dataclass(frozen=True, slots=True)
class OwnCall:
    """One call of such a module in a forward pass."""

    module: nn.Module
    name: str
    arguments: Mapping[Path, Part]
    results: Mapping[Path, Part]
    writes: tuple[Write, ...]

    @property
    def visibility(self) -> Visibility:
        """Which tokens have to be kept: all of them, unless keys and values alone are, for a mask with a window."""
        masks = {part.visibility for part in self.arguments.values() if part.visibility is not None}
        keeps_more = len(self.writes) > 1 or any(part.kept is not None for part in self.arguments.values())
        return Visibility() if keeps_more or len(masks) != 1 else masks.pop()

    @property
    def kept(self) -> list[TokenTensor]:
        """All that is kept of a token, in the order of a row: contexts first, then what is written."""
        contexts = [part.kept for part in self.arguments.values() if part.kept is not None]
        return contexts + [tensor for write in self.writes for tensor in write.tensors]

    @property
    def takes_batches(self) -> bool:
        """Whether several sequences can be told apart in all that it is given, keeps and returns."""
        parts = [part for part in (*self.arguments.values(), *self.results.values()) if not part.depends_on_context]
        dims = [part.batch_dim for part in parts if part.role in (Role.TOKENS, Role.CONTEXT)]
        return None not in [*dims, *(tensor.batch_dim for tensor in self.kept)]

    def spec(self, dtype: torch.dtype) -> LayerSpec:
        """A layer of the cache, of this dtype, that has one row a token."""
        width = sum(tensor.width(dtype) for tensor in self.kept)
        return LayerSpec(self.name, 1, 1, key_dim=width, value_dim=0, visibility=self.visibility)


@dataclass(frozen=True, slots=True, eq=False)
class PerTurn:
    """A result that requests cannot share: it goes from one such module to the next, through code that hands it on."""

    values: tuple[Tensor, ...]
    """One of each turn of the pass."""


def leaves_of(value: Any) -> list[tuple[Path, Any]]:
    """All that is inside nested arguments or results, with paths; a cache is one thing."""
    return list(_pytree.tree_flatten_with_path(value, is_leaf=lambda inner: isinstance(inner, Cache))[0])
