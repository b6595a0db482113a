"""Mixtures of experts whose experts are dealt to ranks whole.

Every rank has all tokens and the router's choices. It runs the choices that fall on its experts, leaves out the others,
and outputs are added up. Tokens do not travel: with tensor parallelism every rank has them anyway.

Source: Transformers, `distributed/expert_parallel.py` (AllReduceEP), for the form of choices its experts leave out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shardwright.layers.parallel_embedding import local_index
from shardwright.layers.parallel_module import Parallel
from shardwright.layers.parallel_pieces import Pieces


class DealtExperts(Parallel):
    """In front of a module of experts, called with (hidden states, indices of chosen experts, their weights)."""

    expert_pieces: Pieces
    """Of the experts."""
    skips_others: bool
    """Its code leaves out choices whose index is the number of its experts; other code is given a valid one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, of choices that fall on this rank's experts."""
        values = self._localized([*args, *kwargs.values()])
        return super().forward(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

    def _localized(self, values: list[Any]) -> list[Any]:
        return localize_choices(values, self.expert_pieces, self.collectives.rank, skip=self.skips_others)


class DealtRouter(Parallel):
    """In front of a router whose outputs are the choices for dealt experts."""

    expert_pieces: Pieces
    """Of the experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, with weights of 0 for experts elsewhere."""
        output = super().forward(*args, **kwargs)
        return tuple(localize_choices(output, self.expert_pieces, self.collectives.rank, skip=False))


def localize_choices(values: Iterable[Any], pieces: Pieces, rank: int, *, skip: bool) -> list[Any]:
    """Choices of experts as a rank sees them.

    Args:
        values: among them one tensor of integers, the indices of chosen experts, and one of floating-point numbers in
            the same shape, their weights; others are left alone.
        pieces: of the experts.
        rank: whose.
        skip: give experts elsewhere the index after the last, not 0.

    Returns: values with local indices, and weights of 0 for experts elsewhere.
    Raises: ValueError if there are no choices in them.
    """
    values = list(values)
    chosen = [v for v in values if isinstance(v, Tensor) and not v.is_floating_point() and v.dtype is not torch.bool]
    if len(chosen) != 1:
        raise ValueError(f"experts that are dealt to ranks need one tensor of chosen experts, and got {len(chosen)}")
    index, is_here = local_index(chosen[0], pieces, rank)
    if skip:
        index = torch.where(is_here, index, pieces.sizes[rank])

    def localized(value: Any) -> Any:
        if value is chosen[0]:
            return index
        is_weights = isinstance(value, Tensor) and value.is_floating_point() and value.shape == chosen[0].shape
        return value.masked_fill(~is_here, 0) if is_weights else value

    return [localized(value) for value in values]
