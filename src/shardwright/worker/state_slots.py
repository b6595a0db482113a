"""Steps of models with layers that carry a state: Mamba, linear attention, short convolutions, and hybrids of these
with attention.

Transformers' cache protocol has such layers ask a cache for their states and hand back new ones. Here every running
sequence owns a slot, the place of its row in one tensor per state. Decodes run together as [S, 1], their states
gathered before and put back after; the pieces of prompts run one by one. Attention in the same model is paged as ever.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from shardwright.adapt.probe import accepts
from shardwright.adapt.rungs import AttentionRung
from shardwright.adapt.served_model import ServedModel
from shardwright.attention.kv_cache import KVCache
from shardwright.attention.layout import AttentionBackend
from shardwright.cache.spec import CacheGroup, Visibility, bytes_per_block
from shardwright.errors import UnsupportedModelError
from shardwright.worker.inputs import build_inputs
from shardwright.worker.step import Ints, StepTables, wanted_places

_KINDS = ("conv", "recurrent")


class StateCache(DynamicCache):
    """The cache that the module sees in one forward: states are ours to fill in, keys and values pass through to paged
    attention.
    """

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Never asked for to any effect: positions are given, masks are not built."""
        return 0


class StateSlots:
    """States of all rows, a tensor per layer and state; made when a state is first put away.

    Args:
        config: of the model's text part.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._slots: dict[tuple[int, str, int], Tensor] = {}
        self._kernel_sizes: dict[tuple[int, int], Any] = {}
        self._num_rows = 0
        self.has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.fresh().layers)

    @property
    def bytes_per_row(self) -> int:
        return sum(slots[0].nbytes for slots in self._slots.values())

    def allocate(self, num_rows: int) -> None:
        """Make room for as many sequences; what was kept is lost."""
        self._num_rows = num_rows
        self._slots = {
            key: torch.zeros(num_rows, *slots.shape[1:], dtype=slots.dtype, device=slots.device)
            for key, slots in self._slots.items()
        }

    def fresh(self) -> StateCache:
        """The cache of a sequence that begins."""
        return StateCache(config=self._config)

    def gather(self, rows: Tensor) -> StateCache:
        """The cache of sequences that go on; `rows` is [S] int64."""
        cache = self.fresh()
        for (index, kind, state), slots in self._slots.items():
            layer: Any = cache.layers[index]
            getattr(layer, f"{kind}_states")[state] = slots.index_select(0, rows)
            getattr(layer, f"is_{kind}_states_initialized")[state] = True
            layer.has_previous_state[state] = True
            layer.conv_kernel_size[state] = self._kernel_sizes.get((index, state))
        return cache

    def put(self, cache: StateCache, rows: Tensor) -> None:
        """Keep the states of a cache, in the order of `rows`."""
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                continue
            for kind in _KINDS:
                for state, value in getattr(layer, f"{kind}_states").items():
                    if value is None:
                        continue
                    key = (index, kind, state)
                    if key not in self._slots:
                        self._slots[key] = value.new_zeros(self._num_rows, *value.shape[1:])
                    self._slots[key].index_copy_(0, rows, value)
                    self._kernel_sizes[index, state] = layer.conv_kernel_size[state]


class StateSlotModel:
    """Implements StepModel for models with states.

    Args:
        module: the model, weights loaded.
        backend: computes its attention, where it has some.
        num_positions: longest sequence that will be served.
        dtype: of keys and values.
        device: of the module.
        takes_chunks: whether its layers go on from a state with more than one token.

    Raises: UnsupportedModelError if its cache has no layers with states, or its attention cannot be captured.
    """

    rung = AttentionRung.STATE
    reuses_prefixes = False
    max_step_tokens: int | None = None

    def __init__(
        self,
        module: nn.Module,
        backend: AttentionBackend,
        *,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        takes_chunks: bool,
    ) -> None:
        self.takes_chunks = takes_chunks
        if not isinstance(module, PreTrainedModel):
            raise UnsupportedModelError("its code does not use Transformers' cache")
        self._slots = StateSlots(module.config.get_text_config(decoder=True))
        self._cache_name = "cache_params" if accepts(module, "cache_params") else "past_key_values"
        if not self._slots.has_states:
            raise UnsupportedModelError("none of its layers keeps a state in Transformers' cache")
        self._served = ServedModel(module, num_positions=num_positions, needs_attention=False)
        self.layers = self._served.layers
        self.groups = self._served.groups or [CacheGroup(Visibility(), ())]
        self.rung_reason = f"a state slot for each request; {len(self.layers)} attention layers are paged"
        self._backend = backend
        self._dtype = dtype
        self._device = device
        self._kv_cache: KVCache | None = None

    @property
    def bytes_per_row(self) -> int:
        return self._slots.bytes_per_row

    def bytes_per_block(self, block_size: int) -> int:
        size = bytes_per_block(self.layers, self.groups, block_size=block_size, element_bytes=self._dtype.itemsize)
        return max(size, 1)

    def allocate(self, *, num_rows: int, num_blocks: int, block_size: int) -> None:
        self._slots.allocate(num_rows)
        self._kv_cache = KVCache(
            self.layers,
            self.groups,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=self._dtype,
            device=self._device,
        )

    def compute(self, step: StepTables) -> Tensor:
        wanted = wanted_places(step)
        is_decode = (step.num_tokens == 1) & (step.num_computed > 0)
        logits: list[Tensor | None] = [None] * len(step.rows)
        decodes = np.flatnonzero(is_decode)
        if len(decodes):
            for i, row in zip(decodes.tolist(), self._decode(_part(step, decodes)), strict=True):
                logits[i] = row[None][: len(wanted[i])]
        for i in np.flatnonzero(~is_decode).tolist():
            logits[i] = self._prefill(replace(_part(step, np.array([i])), logits_rows=wanted[i]))
        return torch.cat([part for part in logits if part is not None])

    def release(self, rows: list[int]) -> None:
        """Nothing to do: a slot is overwritten by the sequence that takes it."""

    def scrub(self, blocks: list[Ints]) -> None:
        assert self._kv_cache is not None, "allocate comes first"
        for group in blocks:
            self._kv_cache.scrub(torch.from_numpy(group).to(self._device))

    def _decode(self, step: StepTables) -> Tensor:
        """One token of several sequences; returns [S, vocab]."""
        rows = torch.from_numpy(step.rows).to(self._device)
        return self._run(step, self._slots.gather(rows), rows, self._served.forward_decodes)

    def _prefill(self, step: StepTables) -> Tensor:
        """A piece of one sequence's prompt; returns [R, vocab]."""
        rows = torch.from_numpy(step.rows).to(self._device)
        cache = self._slots.fresh() if step.num_computed[0] == 0 else self._slots.gather(rows)
        return self._run(step, cache, rows, self._served.forward)

    def _run(self, step: StepTables, cache: StateCache, rows: Tensor, forward: Any) -> Tensor:
        inputs = build_inputs(step, groups=self.groups, backend=self._backend, device=self._device)
        options = {self._cache_name: cache, "use_cache": True}
        logits: Tensor = forward(inputs, self._kv_cache, self._backend, **options)
        self._slots.put(cache, rows)
        return logits


def _part(step: StepTables, sequences: Ints) -> StepTables:
    """The same step with some of its sequences only, and the logits of their last tokens."""
    num_tokens = step.num_tokens[sequences]
    return replace(
        step,
        rows=step.rows[sequences],
        num_computed=step.num_computed[sequences],
        num_tokens=num_tokens,
        logits_rows=np.cumsum(num_tokens) - 1,
    )
