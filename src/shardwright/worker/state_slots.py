"""Steps of models with layers that carry a state: Mamba, linear attention, short convolutions, and hybrids of these
with attention.

Every running sequence owns a slot, the place of its row in one tensor per state (worker/states.py). Decodes run
together as [S, 1], their states gathered before and put back after; the pieces of prompts run one by one. Attention in
the same model is paged as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shardwright.adapt.agreement import agreed
from shardwright.adapt.rungs import AttentionRung
from shardwright.adapt.served_model import ServedModel
from shardwright.attention.kv_cache import KVCache
from shardwright.attention.layout import AttentionBackend, decodes
from shardwright.cache.spec import CacheGroup, Visibility, bytes_per_block
from shardwright.worker.inputs import build_inputs
from shardwright.worker.states import find_states
from shardwright.worker.step import Ints, StepTables, wanted_places


class StateSlotModel:
    """Implements StepModel for models with states.

    Args:
        module: the model, weights loaded.
        backend: computes its attention, where it has some.
        num_positions: longest sequence that will be served.
        vocab_size: number of token ids to draw tokens from.
        dtype: of keys and values.
        device: of the module.
        takes_chunks: whether its layers go on from a state with more than one token.
        decodes_together: whether its code keeps sequences of a batch apart.
        expanded_because: why keys and values are cached even where a latent would do; empty if they are not.
        own_rows: see ServedModel.
        agree: whether all ranks that share the model say yes.

    Raises: UnsupportedModelError if it keeps no states, or its attention cannot be captured.
    """

    rung = AttentionRung.STATE
    reuses_prefixes = False
    can_rewind = False
    max_step_tokens: int | None = None

    def __init__(
        self,
        module: nn.Module,
        backend: AttentionBackend,
        *,
        num_positions: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        takes_chunks: bool,
        decodes_together: bool,
        expanded_because: str = "",
        own_rows: torch.dtype | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.takes_chunks = takes_chunks
        self._decodes_together = decodes_together
        self._states = agreed(lambda: find_states(module, vocab_size=vocab_size, agree=agree), agree)
        self._served = ServedModel(
            module,
            num_positions=num_positions,
            needs_attention=False,
            expanded_because=expanded_because,
            own_rows=own_rows,
            own_together=decodes_together,
            has_states=True,
            agree=agree,
        )
        self.layers = self._served.layers
        self.groups = self._served.groups or [CacheGroup(Visibility(), ())]
        paged = f"{len(self._served.calls)} attention layers are paged{self._served.latents.describe()}"
        self.rung_reason = "; ".join(["a state slot for each request", paged, *self._served.own_reasons])
        self.rung_reason += "; prefixes are not reused: no states of them are kept"
        if not decodes_together:
            self.rung_reason += "; decodes run one by one: its code mixes the sequences of a batch"
        own = self._served.own
        self.batches_own = own is not None and own.together
        """As of PackedModel."""
        self._backend = backend
        self._dtype = dtype
        self._device = device
        self._kv_cache: KVCache | None = None

    @property
    def bytes_per_row(self) -> int:
        return self._states.bytes_per_row

    def bytes_per_block(self, block_size: int) -> int:
        size = bytes_per_block(self.layers, self.groups, block_size=block_size, element_bytes=self._dtype.itemsize)
        return max(size, 1)

    def allocate(self, *, num_rows: int, num_blocks: int, block_size: int) -> None:
        self._states.allocate(num_rows)
        self._kv_cache = KVCache(
            self.layers,
            self.groups,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=self._dtype,
            device=self._device,
        )

    def fill(self, seed: int) -> None:
        """Write random numbers to the cache of keys and values."""
        assert self._kv_cache is not None, "allocate comes first"
        self._kv_cache.fill(seed)

    def compute(self, step: StepTables) -> Tensor:
        wanted = wanted_places(step)
        is_decode = decodes(step.num_tokens, step.num_computed)
        logits: list[Tensor | None] = [None] * len(step.rows)
        decoding = np.flatnonzero(is_decode)
        for batch in [decoding] if self._decodes_together and len(decoding) else decoding[:, None]:
            for i, row in zip(batch.tolist(), self._decode(_part(step, batch)), strict=True):
                logits[i] = row[None][: len(wanted[i])]
        for i in np.flatnonzero(~is_decode).tolist():
            logits[i] = self._prefill(step.of(i, wanted[i]))
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
        return self._run(step, self._states.gather(rows), rows, self._served.forward_decodes)

    def _prefill(self, step: StepTables) -> Tensor:
        """A piece of one sequence's prompt; returns [R, vocab]."""
        rows = torch.from_numpy(step.rows).to(self._device)
        options = self._states.fresh() if step.num_computed[0] == 0 else self._states.gather(rows)
        return self._run(step, options, rows, self._served.forward)

    def _run(self, step: StepTables, options: dict[str, Any], rows: Tensor, forward: Any) -> Tensor:
        inputs = build_inputs(step, groups=self.groups, backend=self._backend, device=self._device)
        logits: Tensor = forward(inputs, self._kv_cache, self._backend, **options)
        self._states.put(options, rows)
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
