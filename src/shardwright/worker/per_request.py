"""Steps one request at a time: with the model's own cache, as Hugging Face `generate` runs it, or with none.

The last rungs of the ladder. Nothing is packed, so nothing is asked of the code but what `generate` asks, or a plain
forward pass. Prompts come whole; requests still take turns step by step, so one that is long does not keep the others
from their tokens for more than its own prompt. Blocks are an account only: they bound the memory of caches whose inside
is the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.utils import GenerationMixin

from shardwright.adapt.logits import own_logits
from shardwright.adapt.probe import accepts, set_attention
from shardwright.adapt.rungs import AttentionRung
from shardwright.cache.spec import CacheGroup, LayerSpec, Visibility
from shardwright.errors import UnsupportedModelError
from shardwright.worker.step import Ints, StepTables, wanted_places

MEASURED_TOKENS = 32
"""Tokens of the sequence whose cache is measured."""


class RecomputingModel:
    """Implements StepModel by a full forward pass per sequence and step.

    Args:
        module: the model, weights loaded; called as `module(input_ids)`.
        reason: why no better rung would do.
        device: of the module.
    """

    rung = AttentionRung.RECOMPUTE
    takes_chunks = False
    reuses_prefixes = False
    can_rewind = False
    bytes_per_row = 0
    max_step_tokens: int | None = None

    def __init__(self, module: nn.Module, reason: str, *, device: torch.device) -> None:
        self.rung_reason = reason
        self.layers: list[LayerSpec] = []
        self.groups = [CacheGroup(Visibility(), ())]
        self._module = module
        self._device = device

    def bytes_per_block(self, block_size: int) -> int:
        """Nothing is kept; one byte stands for it, so that a budget still bounds the number of blocks."""
        return 1

    def allocate(self, *, num_rows: int, num_blocks: int, block_size: int) -> None:
        """Nothing to do: nothing is kept."""

    def compute(self, step: StepTables) -> Tensor:
        rows = []
        for i, wanted in enumerate(wanted_places(step)):
            if len(wanted):
                end = int(step.num_computed[i] + step.num_tokens[i])
                places = (wanted + step.num_computed[i]).tolist()
                rows.append(own_logits(self._module, self._tokens(step, i, 0, end), places))
        return torch.cat(rows) if rows else torch.empty(0, 0, device=self._device)

    def release(self, rows: list[int]) -> None:
        """Nothing to do: nothing is kept."""

    def scrub(self, blocks: list[Ints]) -> None:
        """Nothing to do: nothing is kept."""

    def _tokens(self, step: StepTables, i: int, start: int, end: int) -> Tensor:
        tokens = step.token_rows[step.rows[i], start:end].astype(np.int64)
        return torch.from_numpy(tokens)[None].to(self._device)


class PerRequestModel(RecomputingModel):
    """Implements StepModel with one cache of the model's own kind per row.

    Args:
        module: a model that can `generate`, weights loaded.
        reason: why no better rung would do.
        device: of the module.
        is_whole: whether all layers run here, and not those of one pipeline stage alone.

    Raises: UnsupportedModelError if the model keeps no cache.
    """

    rung = AttentionRung.PER_REQUEST

    def __init__(self, module: nn.Module, reason: str, *, device: torch.device, is_whole: bool = True) -> None:
        super().__init__(module, reason, device=device)
        self._is_whole = is_whole
        if not isinstance(module, GenerationMixin):
            raise UnsupportedModelError("its code is not made for Hugging Face `generate`")
        self._generator: Any = module
        self._takes_positions = accepts(module, "position_ids")
        self._cache_name = "cache_params" if accepts(module, "cache_params") else "past_key_values"
        self._states: dict[int, dict[str, Any]] = {}
        self._bytes_per_token = self._measure()

    def bytes_per_block(self, block_size: int) -> int:
        return self._bytes_per_token * block_size

    def compute(self, step: StepTables) -> Tensor:
        rows = []
        for i, wanted in enumerate(wanted_places(step)):
            start, count = int(step.num_computed[i]), int(step.num_tokens[i])
            logits = self._advance(int(step.rows[i]), self._tokens(step, i, 0, start + count), start)
            rows.append(logits[torch.from_numpy(wanted - count + len(logits)).to(self._device)])
        return torch.cat(rows)

    def release(self, rows: list[int]) -> None:
        for row in rows:
            self._states.pop(row, None)

    def _advance(self, row: int, input_ids: Tensor, start: int) -> Tensor:
        """Compute the tokens of a row from `start` on; returns logits [T, vocab] of at least the last of them."""
        if start == 0:
            state: dict[str, Any] = {"use_cache": True, "attention_mask": None}
            if self._takes_positions:
                state["position_ids"] = torch.arange(input_ids.shape[1], device=self._device)[None]
            if self._generator._supports_default_dynamic_cache():
                text_config = self._generator.config.get_text_config(decoder=True)
                state[self._cache_name] = DynamicCache(config=text_config)
            inputs = self._generator.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **state)
        else:
            state = self._states[row]
            new = input_ids.shape[1] - start
            inputs = self._generator.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **state)
        output = self._generator(**inputs, return_dict=True)
        self._states[row] = self._generator._update_model_kwargs_for_generation(output, state, is_encoder_decoder=False)
        if not self._is_whole:
            count_elsewhere(self._states[row].get(self._cache_name), input_ids.shape[1], self._device)
        logits: Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def _measure(self) -> int:
        """Bytes per token of the cache of a short sequence; a state of fixed size counts as if it were one."""
        set_attention(self._generator, "sdpa" if self._generator._supports_sdpa else "eager")
        self._advance(-1, torch.zeros(1, MEASURED_TOKENS, dtype=torch.int64, device=self._device), 0)
        state = self._states.pop(-1)
        caches = [value for name, value in state.items() if name not in ("attention_mask", "position_ids")]
        total = sum({t.data_ptr(): t.nbytes for t in _tensors(caches, set())}.values())
        if total == 0:
            raise UnsupportedModelError("it keeps no cache between tokens")
        return -(-total // MEASURED_TOKENS)


def count_elsewhere(cache: Any, num_tokens: int, device: torch.device) -> None:
    """Let the parts of a cache whose layers run on other pipeline stages know how many tokens there are.

    Code around the layers asks some layer's part, often the first one's, for lengths of masks and for positions. Keys
    of one byte a token stand for those that are kept elsewhere.
    """
    if not isinstance(cache, Cache):
        return
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin) and (missing := num_tokens - layer.get_seq_length()) > 0:
            nothing = torch.zeros(1, 1, missing, 1, dtype=torch.int8, device=device)
            layer.update(nothing, nothing)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors inside caches, whatever they are made of."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, seen)
    elif type(value).__module__.startswith("transformers") and hasattr(value, "__dict__"):
        yield from _tensors(vars(value), seen)
