"""What a Transformers mask function means: full, sliding or chunked causal attention, found by asking it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardwright.cache.spec import Visibility, VisibilityKind
from shardwright.errors import UnsupportedModelError

FARTHEST = 1 << 17
"""Positions past this are not tried: a window that long is as good as none."""


def read_visibility(mask_function: Callable[..., Any], *, num_positions: int, size_hint: int | None) -> Visibility:
    """Find out which earlier positions a mask function lets a query see.

    Args:
        mask_function: (batch, head, query, key) to bool, by index, as masks are written in Transformers.
        num_positions: positions that will occur.
        size_hint: window or chunk size that the model names beside its mask.

    Raises: UnsupportedModelError if it is none of the kinds we know.
    """
    last = max(1, min(num_positions, FARTHEST)) - 1

    def seen(query: int) -> torch.Tensor:
        keys = torch.arange(query + 2)
        zero = torch.tensor(0)
        allowed = torch.as_tensor(mask_function(zero, zero, torch.tensor(query), keys))
        if allowed.device.type == "meta":
            raise _OnMetaError
        return allowed.bool().expand(len(keys))

    def first_seen(query: int) -> int:
        allowed = seen(query)
        first = int(allowed.int().argmax())
        if bool(allowed[-1]) or not bool(allowed[first:-1].all()):
            raise UnsupportedModelError("its attention mask is not causal, or has holes")
        return first

    try:
        sizes = {last + 1 - first_seen(last)} | ({size_hint} if size_hint else set())
        candidates = [Visibility()]
        candidates += [Visibility(kind, s) for s in sizes for kind in (VisibilityKind.SLIDING, VisibilityKind.CHUNKED)]
        probes = {0, 1, 2, last // 2, last - 1, last}
        probes |= {s * k + d for s in sizes for k in (1, 2) for d in (-1, 0, 1)}
        asked = {query: first_seen(query) for query in probes if 0 <= query <= last}
    except _OnMetaError:  # only chunked masks hold a tensor, of left padding; a model on "meta" can't be asked more
        return Visibility(VisibilityKind.CHUNKED, size_hint)
    except (
        IndexError
    ):  # it looks into a tensor as long as the probe, such as which tokens belong to an image: none here
        return Visibility(VisibilityKind.SLIDING, size_hint) if size_hint else Visibility()
    for candidate in candidates:
        if all(candidate.first_visible(query) == first for query, first in asked.items()):
            return candidate
    raise UnsupportedModelError("its attention mask is neither full, sliding nor chunked")


class SeenMasks:
    """Masks that were made in a forward pass, told by their storage, also through slices.

    Models also make masks that none of their layers uses, so one that we can't serve is no error yet.

    Args:
        num_positions: positions that will occur.
    """

    def __init__(self, num_positions: int) -> None:
        self._num_positions = num_positions
        self._masks: list[Tensor] = []
        self._visibilities: dict[int, Visibility | UnsupportedModelError] = {}

    def note(self, mask: Tensor, mask_function: Callable[..., Any], size_hint: int | None) -> Tensor:
        """See a mask, and what it was made of; returns it."""
        visibility: Visibility | UnsupportedModelError
        try:
            visibility = read_visibility(mask_function, num_positions=self._num_positions, size_hint=size_hint)
        except UnsupportedModelError as exc:
            visibility = exc
        self._masks.append(mask)  # keeps the storage alive, so that its identity stays unique
        self._visibilities[mask.untyped_storage()._cdata] = visibility
        return mask

    def find(self, tensor: Tensor) -> Visibility | None:
        """What a mask means; None if the tensor is none of those seen.

        Raises: UnsupportedModelError if it is none of the kinds we know.
        """
        visibility = self._visibilities.get(tensor.untyped_storage()._cdata)
        if isinstance(visibility, UnsupportedModelError):
            raise visibility
        return visibility


class _OnMetaError(Exception):
    pass
