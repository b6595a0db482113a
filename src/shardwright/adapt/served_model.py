"""The user's module, ready to serve: packed tokens in, logits of chosen rows out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.adapt import dispatch
from shardwright.adapt.agreement import agreed
from shardwright.adapt.count_answers import AnsweringMode, CountAnswers
from shardwright.adapt.count_calls import CountCalls
from shardwright.adapt.latent import LatentTaps, no_latents
from shardwright.adapt.logits import logits_of, rows_of
from shardwright.adapt.own_attention import OwnAttention
from shardwright.adapt.own_probe import find_own_calls
from shardwright.adapt.own_requests import LonePrompt, PagedRequests
from shardwright.adapt.paged import ForwardInputs, PagedStep
from shardwright.adapt.probe import (
    NUM_COUNTED_TOKENS,
    NUM_PROBE_TOKENS,
    AttentionCall,
    accepts,
    probe_attention,
    probe_counts,
    probe_latents,
    set_attention,
)
from shardwright.adapt.rungs import AttentionRung
from shardwright.attention.kv_cache import KVCache
from shardwright.attention.layout import AttentionBackend
from shardwright.cache.spec import CacheGroup, LayerSpec, group_layers
from shardwright.errors import UnsupportedModelError


class ServedModel:
    """A Transformers model whose attention is ours.

    Args:
        module: in eval mode; on "meta" it can be looked at but not run.
        num_positions: longest sequence that will be served.
        needs_attention: whether a model that never attends is refused.
        expanded_because: why keys and values are cached even where a latent would do; empty if they are not.
        own_rows: dtype of what modules keep whose attention cannot be captured, and that run their own over pages;
            None: there may be none.
        own_together: whether such a module may be given the decodes of several requests at once.
        has_states: whether it has layers that carry states, which somebody takes care of.
        agree: whether all ranks that share the model say yes; each asks after the same forward passes.

    Raises: UnsupportedModelError if its attention cannot be captured, with the reason.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        num_positions: int,
        needs_attention: bool = True,
        expanded_because: str = "",
        own_rows: torch.dtype | None = None,
        own_together: bool = True,
        has_states: bool = False,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        dispatch.register()
        self.module = module
        self.rung = AttentionRung.INTERFACE
        self._takes_positions = accepts(module, "position_ids", or_any=True)
        self.own: OwnAttention | None = None
        if own_rows is not None:
            find = partial(find_own_calls, module, num_positions=num_positions, has_states=has_states)
            self.own = OwnAttention(module, agreed(find, agree), dtype=own_rows, together=own_together)
            needs_attention = False
        probe = partial(probe_attention, module, num_positions=num_positions, needs_attention=needs_attention)
        with self._looking(NUM_PROBE_TOKENS):
            self.calls: list[AttentionCall] = agreed(probe, agree)
        if (self.calls or self.own) and not self._takes_positions:
            raise UnsupportedModelError(
                f"{type(module).__name__}.forward takes no position_ids, so tokens of several requests cannot be packed"
            )
        specs = [call.spec for call in self.calls]
        if expanded_because or not self._takes_positions:
            self.latents = no_latents(specs, expanded_because)
        else:
            with self._looking(NUM_PROBE_TOKENS):
                self.latents = probe_latents(module, self.calls, num_positions=num_positions, agree=agree)
        self._taps = LatentTaps(module, self.latents.by_call)
        how = "attention calls go through Transformers' attention interface"
        captured = f"{len(self.calls)} {how}{self.latents.describe()}"
        self.rung_reason = "; ".join(([captured] if self.calls or self.own is None else []) + self.own_reasons)
        self.layers: list[LayerSpec] = self.latents.cached(specs) + ([] if self.own is None else self.own.layers)
        self.groups: list[CacheGroup] = group_layers(self.layers)
        self.head = output_head(module)
        set_attention(module, dispatch.SERVE)
        self._counts: CountAnswers | None = None
        if self._takes_positions and next(module.parameters()).device.type != "meta":
            with self._looking(NUM_COUNTED_TOKENS):
                uses = probe_counts(module, agree)
            self._counts = CountAnswers(CountCalls(), uses, num_positions) if uses else None

    @property
    def own_reasons(self) -> list[str]:
        """What of modules that run their own attention a reader of the rung's reason wants to know."""
        return [] if self.own is None else [self.own.describe()]

    def forget(self) -> None:
        """Nothing to do: code that remembers what it may not is not served like this."""

    def forward(self, inputs: ForwardInputs, cache: KVCache, backend: AttentionBackend, **options: Any) -> Tensor:
        """Run one step, all tokens packed as [1, T].

        Args:
            inputs: of the step.
            cache, backend: of the attention.
            options: more arguments for the module.

        Returns: [R, vocab_size] logits, model dtype, for the rows asked for.
        """
        with rows_before_head(self.head, inputs.logits_rows):
            logits: Tensor = self._run(inputs, (1, -1), cache, backend, {"use_cache": False} | options)[0]
        return rows_of(logits, inputs.logits_rows)

    def forward_decodes(
        self, inputs: ForwardInputs, cache: KVCache, backend: AttentionBackend, **options: Any
    ) -> Tensor:
        """Run a step of one token per sequence, as [S, 1]: for layers that keep sequences apart by the batch dimension.

        Returns: [S, vocab_size] logits, model dtype.
        """
        return self._run(inputs, (-1, 1), cache, backend, options)[:, 0]

    def _run(
        self,
        inputs: ForwardInputs,
        shape: tuple[int, int],
        cache: KVCache,
        backend: AttentionBackend,
        options: dict[str, Any],
    ) -> Tensor:
        step = PagedStep(inputs, cache, backend)
        handler = PagedAttention(self.calls, self._taps, step)
        tokens, position_ids = inputs.input_ids.view(shape), inputs.position_ids.view(shape)
        if self._takes_positions:
            options = {"position_ids": position_ids} | options
        own: AbstractContextManager[None] = nullcontext()
        if self.own is not None:
            requests = PagedRequests(step, in_batch=shape[1] == 1, together=self.own.together)
            own = self.own.serving(requests, first_layer=len(self.calls))
        with dispatch.handling(handler), self._taps.open(), self._answered_counts(position_ids), own:
            output = self.module(input_ids=tokens, **options)
        return logits_of(output)

    def _looking(self, num_tokens: int) -> AbstractContextManager[None]:
        """Open around a look at the model with a prompt of so many tokens: modules that attend by themselves do."""
        return nullcontext() if self.own is None else self.own.serving(LonePrompt(num_tokens), first_layer=0)

    @contextmanager
    def _answered_counts(self, position_ids: Tensor) -> Iterator[None]:
        """While open, counts of tokens are positions, if the module's code counts."""
        if self._counts is None:
            yield
            return
        self._counts.begin(position_ids)
        with AnsweringMode(self._counts):
            yield
        self._counts.end()


class PagedAttention:
    """Answers the attention calls of one forward pass from the paged cache."""

    def __init__(self, calls: list[AttentionCall], taps: LatentTaps, step: PagedStep) -> None:
        self._calls = calls
        self._taps = taps
        self._step = step
        self._next = 0

    def make_mask(self, mask_function: Callable[..., Any], options: dict[str, Any]) -> Tensor | None:
        """Never needed: causality and windows are in the plans."""
        return None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        index = self._next
        self._next += 1
        call = self._calls[index]
        if call.module is not module:
            raise UnsupportedModelError(
                f"attention call {index} came from another module than at load ({call.spec.name}): "
                "the order of its layers depends on the data"
            )
        query_THD, key_TKD, value_TKV = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
        output = self._step.attend(index, query_THD, key_TKD, value_TKV, call.params, self._taps.take(index))
        return output.view(query.shape[0], query.shape[2], *output.shape[1:])


@contextmanager
def rows_before_head(head: nn.Module | None, rows: Tensor) -> Iterator[None]:
    """While open, the head computes only the rows asked for: logits of a whole prompt would be most of its memory."""
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].index_select(1, rows), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def output_head(module: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, if the model names one."""
    get_head: Callable[[], Any] | None = getattr(module, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return head if isinstance(head, nn.Module) else None
