"""Turn a module into one of which this rank holds a part, whatever its class."""

from __future__ import annotations

from functools import cache

from torch import nn

from shardwright.layers.collectives import Collectives
from shardwright.layers.parallel_embedding import VocabParallelEmbedding
from shardwright.layers.parallel_linear import (
    ColumnParallelLinear,
    GatheredColumnParallelLinear,
    RowParallelLinear,
    SplitRowParallelLinear,
)
from shardwright.layers.parallel_module import GatheredOutput, Parallel

PARALLEL_LINEARS = (ColumnParallelLinear, GatheredColumnParallelLinear, RowParallelLinear, SplitRowParallelLinear)
"""Their products are those of nn.Linear."""

_NAMED = {cls.__bases__: cls for cls in (*PARALLEL_LINEARS, VocabParallelEmbedding)}


def become(module: nn.Module, *parts: type[Parallel], collectives: Collectives, **values: object) -> None:
    """Put classes in front of a module's own, in place.

    Args:
        module: of any class.
        parts: outermost first.
        collectives: for all of them.
        values: attributes that they ask for.
    """
    module.__class__ = combined((*parts, type(module)))
    for name, value in {"collectives": collectives, **values}.items():
        setattr(module, name, value)


def gather_logits_once(module: nn.Module, *, only_first_rank: bool = True) -> None:
    """Let only rank 0 of a sharded model have logits, the others zeros of the same shape; or all ranks again."""
    for held in module.modules():
        if isinstance(held, GatheredOutput) and held.makes_logits:
            held.only_first_rank = only_first_rank


@cache
def combined(bases: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    """The class of a module whose own class, the last, has others in front of it."""
    own = bases[-1]
    return _NAMED.get(bases) or type(f"Parallel{own.__name__}", bases, {"__module__": own.__module__})
