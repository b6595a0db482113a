"""A module that computes its attention itself, served packed: its own code runs, and ours answers where it attends.

Before it is served, its code is watched: a short pass tells which calls matter (adapt/trace.py), a long one what its
attention means (adapt/fit.py). While it serves, those calls are answered differently (adapt/interception.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.adapt.agreement import agreed
from shardwright.adapt.arguments import plain_arguments, with_positions
from shardwright.adapt.counting import COUNTS_ONCE
from shardwright.adapt.dispatch import blank_masks
from shardwright.adapt.far_fit import far_rows, fit_far
from shardwright.adapt.far_scores import FarMode
from shardwright.adapt.fit import FittedAttention, fit_attention, with_biases
from shardwright.adapt.followed import AttentionTrace
from shardwright.adapt.interception import ServingMode
from shardwright.adapt.latent import LatentFinder, LatentSearch, LatentTaps, find_latents, no_latents
from shardwright.adapt.logits import logits_of, rows_of
from shardwright.adapt.paged import ForwardInputs, PagedStep
from shardwright.adapt.probe import accepts
from shardwright.adapt.remembered import Remembered
from shardwright.adapt.rungs import AttentionRung
from shardwright.adapt.sample import Sample
from shardwright.adapt.served_model import output_head, rows_before_head
from shardwright.adapt.special_ids import find_special_ids, ordinary_ids
from shardwright.adapt.trace import ForwardTrace, TracingMode
from shardwright.attention.kv_cache import KVCache
from shardwright.attention.layout import AttentionBackend
from shardwright.cache.spec import CacheGroup, LayerSpec, group_layers
from shardwright.errors import UnsupportedModelError
from shardwright.foreign_errors import described

SHORT_TRACE = 13
"""Tokens of the trace that finds which calls count tokens: a number that is unlikely to be a size of the model."""

LONG_TRACE = 509
"""Tokens of the trace that is fitted, if the model takes as many: windows up to this long are seen; the trace is
longer for a model whose config names a longer one."""

FAR_TRACES = (2039, 4093, 8191)
"""Tokens of the traces that show masks and biases farther away; nothing else is computed in them. These are no sizes of
a model."""

MAX_FAR_BYTES = 1 << 30
"""A trace that would make a larger tensor is left out,"""

FAR_PATIENCE_S = 2.0
"""and so is one that would take longer, by the clock of this process; twice as long if it adds an unsettled bias;"""

MOST_PATIENCE_S = 3.0
"""one that takes that long all the same is given up, which only the shortest may not be."""

REPEATED = 0.1
"""Share of an example's tokens that are the same as the one before: code may look for repetitions."""

ROWS_TOLERANCE = 1e-2
"""Largest difference of logits, relative to the largest logit, that computing fewer rows of them may make."""


class InterceptedModel:
    """Serves a module that calls scaled_dot_product_attention, or multiplies, masks and sums by itself.

    Args:
        module: in eval mode, weights loaded.
        num_positions: longest sequence that will be served.
        vocab_size: number of token ids.
        fresh: what its code keeps, before it ran; default: what it keeps now.
        needs_attention: whether a model that never attends is refused.
        expanded_because: why keys and values are cached even where a latent would do; empty if they are not.
        agree: whether all ranks that share the model say yes; each asks after the same forward passes.

    Raises: UnsupportedModelError if its attention cannot be found or understood.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        num_positions: int,
        vocab_size: int,
        fresh: Remembered | None = None,
        needs_attention: bool = True,
        expanded_because: str = "",
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.module = module
        self._vocab_size = vocab_size
        self._takes_positions = accepts(module, "position_ids")
        self._agree = agree
        self._fresh = fresh or Remembered(module)
        self._forgets = False
        self.special_ids: list[int] = []
        """Token ids that its code treats in a way of its own; what is known of its attention holds for the others."""
        self.special_ids = agreed(self._find_special_ids, agree)
        # The long trace comes first, so that tables that grow with the prompt have grown.
        num_near = _long_trace(module, num_positions)
        long, attentions = agreed(lambda: self._fit_near(num_near, needs_attention), agree)
        short = agreed(lambda: self._find_counts(long, num_positions), agree)
        if num_positions > num_near:
            attentions = self._fit_far(long, attentions, num_near, num_positions)
        self._attentions = with_biases(attentions, num_positions)
        self.rung, how = _kind_of(long)
        specs = [attention.spec for attention in self._attentions]
        if expanded_because:
            self.latents = no_latents(specs, expanded_because)
        else:
            self.latents = self._find_latents(specs, num_positions)
        self._taps = LatentTaps(module, self.latents.by_call)
        self.rung_reason = (
            f"{len(specs)} {how} in its own code are answered by paged attention{self.latents.describe()}"
        )
        self.layers: list[LayerSpec] = self.latents.cached(specs)
        self.groups: list[CacheGroup] = group_layers(self.layers)
        head = agreed(lambda: self._head_of_rows(min(SHORT_TRACE, num_positions)), agree)
        self.head = None if short.gives_last_alone else head
        self._mode = ServingMode(module, short, self._attentions, self._taps, num_positions)

    def forward(self, inputs: ForwardInputs, cache: KVCache, backend: AttentionBackend) -> Tensor:
        """Run one step. Returns [R, vocab_size] logits, model dtype, for the rows asked for."""
        arguments = self._arguments(inputs.position_ids)
        tokens = inputs.input_ids[None]
        self.forget()
        self._mode.begin(PagedStep(inputs, cache, backend))
        with blank_masks(), rows_before_head(self.head, inputs.logits_rows), self._taps.open(), self._mode:
            output = self.module(tokens, **arguments)
        self._mode.end()
        return rows_of(logits_of(output)[0], inputs.logits_rows)

    def forget(self) -> None:
        """Before each pass of the module: let it forget the last one, if it would make use of it in a wrong way."""
        if self._forgets:
            self._fresh.restore()

    @torch.inference_mode()
    def _find_special_ids(self) -> list[int]:
        tokens, arguments = self._example(SHORT_TRACE - 2)  # of this length only here, if code remembers lengths
        return find_special_ids(self.module, tokens, arguments, vocab_size=self._vocab_size)

    def _fit_near(self, num_tokens: int, needs_attention: bool) -> tuple[ForwardTrace, list[FittedAttention]]:
        """Watch a long prompt, and understand every attention in it."""
        fitted: dict[int, FittedAttention] = {}
        misfits: list[UnsupportedModelError] = []
        tokens, _ = self._example(num_tokens)

        def keep(logits: Tensor) -> None:
            self.sample = Sample.of(tokens, logits[0])

        def fit(number: int, trace: AttentionTrace) -> None:
            try:
                fitted[number] = fit_attention(trace, f"attention {number}")
            except UnsupportedModelError as exc:  # the pass goes on: other ranks may be in it
                misfits.append(exc)

        trace = self._trace(num_tokens, fit, keep)
        if misfits:
            raise misfits[0]
        if needs_attention and not trace.attentions:
            raise UnsupportedModelError("no attention was found in its forward pass")
        for number in {*range(len(trace.attentions))} - {*fitted}:
            fit_attention(trace.attentions[number], f"attention {number}")  # which says what is missing
        return trace, [fitted[number] for number in range(len(fitted))]

    def _find_counts(self, long: ForwardTrace, num_positions: int) -> ForwardTrace:
        """Watch short prompts: which calls count tokens."""
        short, again = self._trace_shortly(num_positions)
        if short.counts != again.counts or (short.num_rows or num_positions) < num_positions:
            self._fresh.only_changed()
            self._forgets = True  # then it counts anew in every pass, and makes its tables as long as they need be
            short, again = self._trace_shortly(num_positions)
        paths = {(len(trace.attentions), trace.num_products) for trace in (long, short, again)}
        if len(paths) > 1:
            raise UnsupportedModelError("its code computes differently for different prompts")
        if short.counts != again.counts:
            raise UnsupportedModelError(COUNTS_ONCE)
        if short.decisions != again.decisions:
            raise UnsupportedModelError("its code decides by a number computed of all tokens of a prompt together")
        if short.num_rows is not None and short.num_rows < num_positions:
            raise UnsupportedModelError(
                f"a table in its code has {short.num_rows:,} positions, but {num_positions:,} are to be served"
            )
        return short

    def _trace_shortly(self, num_positions: int) -> tuple[ForwardTrace, ForwardTrace]:
        with blank_masks():
            num_tokens = min(SHORT_TRACE, num_positions)
            return self._trace(num_tokens), self._trace(num_tokens, seed=1)

    @torch.inference_mode()
    def _trace(
        self,
        num_tokens: int,
        understand: Callable[[int, AttentionTrace], None] = lambda *_: None,
        keep: Callable[[Tensor], None] = lambda _: None,
        seed: int = 0,
    ) -> ForwardTrace:
        tokens, arguments = self._example(num_tokens, seed)
        self.forget()
        mode = TracingMode(self.module, num_tokens, understand)
        try:
            with mode:
                output = self.module(tokens, **arguments)
        except UnsupportedModelError:
            raise
        except Exception as exc:
            reason = f"its forward pass of {num_tokens} tokens fails: {described(exc)}"
            raise UnsupportedModelError(reason) from exc
        logits = logits_of(output)
        mode.finish(num_logits=logits.shape[1] if logits.shape[2] else num_tokens)
        keep(logits)
        return mode.trace

    @torch.inference_mode()
    def _fit_far(
        self, trace: ForwardTrace, near: list[FittedAttention], num_near: int, num_positions: int
    ) -> list[FittedAttention]:
        """The attentions as they are at far positions too; each try reaches farther, while it costs little."""
        precision = torch.finfo(next(self.module.parameters()).dtype).eps
        attentions, largest_bytes, elapsed_s, reached = near, 0, 0.0, 1
        device = next(self.module.parameters()).device
        short = FarMode(
            self.module,
            trace,
            torch.zeros(1, dtype=torch.int64, device=device),
            num_tokens=SHORT_TRACE,
            vocab_size=self._vocab_size,
            patience_s=MOST_PATIENCE_S,
        )
        self._run_far(short)
        lengths = (num_positions if num_positions < 1.05 * length else length for length in FAR_TRACES)
        for num_tokens in sorted({length for length in lengths if num_near < length <= num_positions}):
            growth = (num_tokens / reached) ** 2
            patience = 2 if any(a.bias is not None and not a.bias.is_settled for a in attentions) else 1
            is_affordable = elapsed_s * growth <= patience * FAR_PATIENCE_S
            if not self._agree(largest_bytes * growth <= MAX_FAR_BYTES and is_affordable):
                break
            started = time.process_time()
            rows = far_rows(num_near, num_tokens, device)
            mode = FarMode(
                self.module,
                trace,
                rows,
                num_tokens=num_tokens,
                vocab_size=self._vocab_size,
                patience_s=patience * MOST_PATIENCE_S,
            )
            is_first = reached == 1
            look = partial(self._look_far, mode, short, near, num_near, precision, may_be_late=not is_first)
            looked = agreed(look, self._agree)
            if not self._agree(is_first or not mode.is_late):
                break
            attentions = looked
            largest_bytes, elapsed_s, reached = mode.largest_bytes, time.process_time() - started, num_tokens
        return attentions

    def _look_far(
        self,
        mode: FarMode,
        short: FarMode,
        near: list[FittedAttention],
        num_near: int,
        precision: float,
        *,
        may_be_late: bool,
    ) -> list[FittedAttention]:
        """The attentions as they are as far as a pass reaches; `short` is one of a few tokens."""
        failure = self._run_far(mode)
        if mode.is_late and may_be_late:
            return near
        if missing := [a.spec.name for i, a in enumerate(near) if i not in mode.found]:
            raise UnsupportedModelError(f"{missing[0]}: what it is beyond {num_near:,} tokens is not known{failure}")
        for one, other in zip(short.met, mode.met, strict=False):  # as far as both went
            if not one.is_same(other):
                raise UnsupportedModelError(
                    f"in a pass of {mode.num_tokens:,} tokens its code does something else to the first ones "
                    f"than in one of {short.num_tokens:,}, in a call of {one.name}"
                )
        return [
            fit_far(attention, mode.found[i], mode.rows, num_near=num_near, precision=precision)
            for i, attention in enumerate(near)
        ]

    def _run_far(self, mode: FarMode) -> str:
        """Run a pass of stand-ins. Returns: what went wrong in it, to be added to a line; mostly nothing."""
        tokens, arguments = self._example(mode.num_tokens)
        self.forget()
        try:
            with mode:
                self.module(tokens, **arguments)
        except UnsupportedModelError as exc:
            return f": {exc}"
        except Exception as exc:  # of the module's code, which may look at values
            return f": {described(exc)}"
        return ""

    def _find_latents(self, specs: list[LayerSpec], num_positions: int) -> LatentSearch:
        """Watch a short prompt: what keys and values are made of."""

        def run(finder: LatentFinder) -> None:
            def look(number: int, trace: AttentionTrace) -> None:
                assert trace.value is not None
                heads = self._attentions[number].cached_heads
                finder.look(number, heads(trace.key), heads(trace.value))

            with blank_masks(), finder.watching():
                self._trace(min(SHORT_TRACE, num_positions), look)

        return find_latents(self.module, specs, run, agree=self._agree)

    @torch.inference_mode()
    def _head_of_rows(self, num_tokens: int) -> nn.Module | None:
        """The module that makes the logits, if what comes after it does not mind that it makes fewer than tokens.

        It is the one that the model names, else the last linear with an output for each token id.
        """
        linears = [m for m in self.module.modules() if isinstance(m, nn.Linear) and m.out_features == self._vocab_size]
        head = output_head(self.module) or (linears[-1] if linears else None)
        rows = [0, num_tokens - 1]
        tokens, arguments = self._example(num_tokens)
        expected = logits_of(self.module(tokens, **arguments))[0]
        try:
            with rows_before_head(head, torch.tensor(rows, device=tokens.device)):
                actual = logits_of(self.module(tokens, **arguments))[0]
        except Exception:  # of the model's code
            return None
        if len(expected) != num_tokens or actual.shape != (len(rows), *expected.shape[1:]) or not actual.numel():
            return None
        expected = expected[rows]
        return head if (actual - expected).abs().max() <= ROWS_TOLERANCE * expected.abs().max() else None

    def _example(self, num_tokens: int, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
        """Random tokens [1, T], some of them as the one before, and the arguments that go with them."""
        device = next(self.module.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        tokens = ordinary_ids(self._vocab_size, self.special_ids)[
            torch.randint(self._vocab_size - len(self.special_ids), (num_tokens,), generator=generator)
        ]
        again = torch.rand(num_tokens, generator=generator) < REPEATED
        tokens = torch.where(again, tokens.roll(1), tokens)
        return tokens[None].to(device), self._arguments(torch.arange(num_tokens, device=device))

    def _arguments(self, position_ids: Tensor) -> dict[str, Any]:
        """What goes with tokens at these positions ([T] int64)."""
        arguments = with_positions(plain_arguments(self.module, position_ids[None]), position_ids)
        return arguments | ({"position_ids": position_ids[None]} if self._takes_positions else {})


def _kind_of(trace: ForwardTrace) -> tuple[AttentionRung, str]:
    """The rung of a module with these attentions, and what they are."""
    if all(attention.is_sdpa for attention in trace.attentions):
        return AttentionRung.SDPA, "calls of scaled_dot_product_attention"
    if all(attention.is_flex for attention in trace.attentions):
        return AttentionRung.SDPA, "calls of flex_attention"
    return AttentionRung.DATAFLOW, "softmaxes of products of queries and keys"


def _long_trace(module: nn.Module, num_positions: int) -> int:
    """Tokens of the trace that is fitted: longer than every window that the config names and that matters."""
    config = getattr(module, "config", None)
    fields: dict[str, Any] = vars(config) if hasattr(config, "__dict__") else {}
    windows = [size for name, size in fields.items() if "window" in name and isinstance(size, int)]
    longest = max((size for size in windows if size < num_positions), default=0)
    return min(max(LONG_TRACE, longest + SHORT_TRACE), num_positions)
