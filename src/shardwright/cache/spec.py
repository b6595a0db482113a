"""What each attention layer keeps per token, and which layers share block tables.

A block is `block_size` tokens of one *group* of layers. All groups take their blocks from one pool, so that memory goes
where the traffic needs it: block `b` of a group with k layers uses the first k *lanes* of the storage at place `b`.
Groups are therefore cut to about the same number of layers (vLLM's hybrid cache manager does the same).

    storage      lane 0   lane 1   lane 2          groups of a model with layers  S S S F  (S sliding, F full)
    block 0      (null: stands for what fell out of a window)
    block 1      S0       S1       S2          <- a block of the sliding group
    block 2      F3       -        -           <- a block of the full group
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import ceil

import numpy as np
import numpy.typing as npt

NULL_BLOCK = 0
"""Place in a block table without memory: never read by attention, never owned."""

MAX_PADDING = 0.25
"""Largest share of lanes that grouping may leave empty before it prefers more, smaller groups."""


class VisibilityKind(StrEnum):
    """Which earlier positions a query sees."""

    FULL = "full"
    SLIDING = "sliding"
    CHUNKED = "chunked"


@dataclass(frozen=True, slots=True)
class Visibility:
    """Positions that the query at position p sees: `first_visible(p)` to p, both included."""

    kind: VisibilityKind = VisibilityKind.FULL
    size: int | None = None
    """Tokens of the window or chunk; None for full attention."""

    def first_visible(self, position: int) -> int:
        """First position that the query at `position` sees."""
        if self.kind is VisibilityKind.SLIDING:
            return max(0, position - self._size + 1)
        if self.kind is VisibilityKind.CHUNKED:
            return position // self._size * self._size
        return 0

    def first_visible_of(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """`first_visible` of each of several positions."""
        if self.kind is VisibilityKind.SLIDING:
            return np.maximum(positions - self._size + 1, 0)
        if self.kind is VisibilityKind.CHUNKED:
            return positions // self._size * self._size
        return np.zeros_like(positions)

    @property
    def _size(self) -> int:
        assert self.size is not None
        return self.size


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One attention call of the model's forward, in call order."""

    name: str
    """Qualified name of the module that makes the call."""
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    visibility: Visibility = Visibility()
    values_in_keys: bool = False
    """The one KV head's value is the first `value_dim` numbers of its key, and kept once: a latent that keys and values
    of all query heads are made of (see attention/latent.py)."""

    @property
    def is_own(self) -> bool:
        """Whether it is no attention of ours that reads it: a row of whatever the module's own attention keeps."""
        return not self.value_dim

    @property
    def key_elements(self) -> int:
        """Numbers kept per token as keys, of all KV heads."""
        return self.num_kv_heads * self.key_dim

    @property
    def value_elements(self) -> int:
        """Numbers kept per token as values, of all KV heads."""
        return 0 if self.values_in_keys else self.num_kv_heads * self.value_dim

    @property
    def elements_per_token(self) -> int:
        """Numbers kept per token."""
        return self.key_elements + self.value_elements


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers with one block table: same visibility, about as many as in other groups."""

    visibility: Visibility
    layers: tuple[int, ...]
    """Indices of the layers; the i-th uses lane i."""


def group_layers(layers: list[LayerSpec]) -> list[CacheGroup]:
    """Cut the layers into groups of one visibility and about equal size.

    The size is the largest that leaves at most MAX_PADDING of all lanes empty: fewer groups mean fewer block tables.
    """
    if not layers:
        return []
    by_visibility: dict[Visibility, list[int]] = {}
    for index, layer in enumerate(layers):
        by_visibility.setdefault(layer.visibility, []).append(index)
    counts = [len(indices) for indices in by_visibility.values()]

    def padding(size: int) -> float:
        lanes = sum(ceil(count / size) * size for count in counts)
        return 1 - len(layers) / lanes

    size = next((s for s in range(max(counts), 0, -1) if padding(s) <= MAX_PADDING), 1)
    return [
        CacheGroup(visibility, tuple(indices[start : start + size]))
        for visibility, indices in by_visibility.items()
        for start in range(0, len(indices), size)
    ]


def lane_elements(layers: list[LayerSpec], groups: list[CacheGroup]) -> list[tuple[int, int]]:
    """Per lane, the most key and value elements per token that a layer on it keeps."""
    num_lanes = max((len(group.layers) for group in groups), default=0)
    lanes = [(0, 0)] * num_lanes
    for group in groups:
        for lane, index in enumerate(group.layers):
            keys, values = lanes[lane]
            lanes[lane] = (max(keys, layers[index].key_elements), max(values, layers[index].value_elements))
    return lanes


def bytes_per_block(layers: list[LayerSpec], groups: list[CacheGroup], *, block_size: int, element_bytes: int) -> int:
    """Bytes that one block of the pool takes over all lanes."""
    return sum(keys + values for keys, values in lane_elements(layers, groups)) * block_size * element_bytes


def blocks_for_sequence(groups: list[CacheGroup], *, num_tokens: int, chunk: int, block_size: int) -> int:
    """Most blocks that one sequence of `num_tokens` holds at once, computed in steps of up to `chunk` tokens."""
    total = 0
    for group in groups:
        held = num_tokens
        if group.visibility.size is not None:
            held = min(num_tokens, group.visibility.size + chunk + block_size)
        total += ceil(held / block_size) + (1 if held < num_tokens else 0)
    return total
