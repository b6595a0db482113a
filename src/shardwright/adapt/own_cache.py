"""The cache that a module sees which runs its own attention: that of one request or a few, whose rows lie in blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from shardwright.adapt.own_calls import OwnCall, Write
from shardwright.adapt.token_rows import TokenTensor
from shardwright.errors import UnsupportedModelError

_STATES = ("conv_states", "recurrent_states")


@dataclass(frozen=True, slots=True)
class OwnRows:
    """The rows of the requests of one turn in one layer of the cache.

    Requests of several lengths end together; what stands before the shorter ones is not theirs, and masked.
    """

    rows_NC: Tensor
    """[num_slots, C], of all requests."""
    new_slots: Tensor
    """[S * T] int64: where the new tokens go."""
    slots: Tensor
    """[S * L] int64: of the tokens that attention may see, the new ones among them."""
    num_sequences: int
    first: int
    """Position of the first token that attention may see, counted so that the longest request is as long as it is."""

    def keep(self, tensor: Tensor, kept: TokenTensor, place: int) -> Tensor:
        """Store what the new tokens have of a tensor, from a place in their rows on; returns that of all tokens."""
        dtype = self.rows_NC.dtype
        columns = self.rows_NC[:, place : place + kept.width(dtype)]
        columns.index_copy_(0, self.new_slots, kept.rows(tensor, dtype))
        return kept.tensor(columns.index_select(0, self.slots), self.num_sequences)

    def width(self, kept: TokenTensor) -> int:
        """Numbers that something takes in a row."""
        return kept.width(self.rows_NC.dtype)


class OwnCache(Cache):
    """Stands for Transformers' cache in one call of a module after another.

    Args:
        inner: the cache that the code around the module is given, if it is given one: its states are these requests'.
        num_computed: tokens of the request before this step; of the longest, if there are several.
    """

    def __init__(self, inner: Cache | None, num_computed: int) -> None:
        super().__init__(layers=[] if inner is None else inner.layers)
        self._num_computed = num_computed

    def begin(self, call: OwnCall, rows: OwnRows, place: int) -> None:
        """Get ready for a call.

        Args:
            call: which it is.
            rows: where it keeps what it keeps.
            place: in a row, of what is written first.
        """
        self._call, self._rows, self._place = call, rows, place
        self._num_writes = 0

    def end(self) -> None:
        """Make sure that all was written. Raises UnsupportedModelError if not."""
        if self._num_writes != len(self._call.writes):
            raise UnsupportedModelError(f"{self._call.name} does not keep what it kept when it was looked at")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._keep("update", key_states, value_states)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        return self._keep("update_indexer", indexer_key_states)[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._num_computed

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._num_computed + query_length - self._rows.first, self._rows.first

    def _keep(self, method: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        writes = self._call.writes
        write: Write | None = writes[self._num_writes] if self._num_writes < len(writes) else None
        if write is None or write.method != method:
            raise UnsupportedModelError(f"{self._call.name} keeps something else than when it was looked at")
        self._num_writes += 1
        whole = []
        for tensor, kept in zip(tensors, write.tensors, strict=True):
            whole.append(self._rows.keep(tensor, kept, self._place))
            self._place += self._rows.width(kept)
        return tuple(whole)


def states_of_one(cache: Cache, index: int) -> Cache:
    """A view of the states of one sequence of a batch: what is changed in place, as Transformers' cache changes
    its states, is changed in the batch.
    """
    view = copy.copy(cache)
    view.layers = [_layer_of_one(layer, index) for layer in cache.layers]
    return view


def _layer_of_one(layer: Any, index: int) -> Any:
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return layer
    view = copy.copy(layer)
    for name in _STATES:
        states: dict[int, Tensor | None] = getattr(layer, name)
        setattr(view, name, {k: None if s is None else s[index : index + 1] for k, s in states.items()})
    return view
