"""Answer the calls of a module's forward pass that a trace knows.

scaled_dot_product_attention is answered by paged attention; a product that makes scores by a stand-in that computes
nothing, whatever the code does to it (scale, mask, softmax, cast); the product of its weights with the values by paged
attention; counts of tokens, and the rows of position tables that go with them, by the true positions; and the last
token, where the code takes no other to its head, by the tokens whose logits are wanted.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright.adapt.calls import OPENED, CallCounter, takes_last_token
from shardwright.adapt.count_answers import CountAnswers
from shardwright.adapt.count_calls import CountCalls, tables_of
from shardwright.adapt.fit import FittedAttention
from shardwright.adapt.flex import FLEX, repeated, wants_more
from shardwright.adapt.latent import LatentTaps
from shardwright.adapt.paged import PagedStep
from shardwright.adapt.products import heads_of
from shardwright.adapt.stand_in import StandIn
from shardwright.adapt.trace import ForwardTrace
from shardwright.errors import UnsupportedModelError


class ServingMode(TorchFunctionMode):
    """Answers the known calls of one forward pass after another.

    Args:
        module: that runs.
        trace: which calls matter.
        attentions: what they mean.
        taps: give the latents of those that cache them; open while the module runs.
        num_positions: longest sequence that is served.
    """

    def __init__(
        self,
        module: nn.Module,
        trace: ForwardTrace,
        attentions: list[FittedAttention],
        taps: LatentTaps,
        num_positions: int,
    ) -> None:
        super().__init__()
        self._trace = trace
        self._attentions = attentions
        self._taps = taps
        self._counter = CallCounter(module, row_labels=trace.row_labels)
        self._sdpa = {a.place: i for i, a in enumerate(trace.attentions) if a.is_sdpa}
        self._scores = {a.place: i for i, a in enumerate(trace.attentions) if not a.is_sdpa}
        self._values = {a.value_place: i for i, a in enumerate(trace.attentions) if a.value_place is not None}
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._counts = CountAnswers(CountCalls(tables_of(module)), trace.counts, num_positions)

    def begin(self, step: PagedStep) -> None:
        """Get ready for a forward pass."""
        self._step, self._inputs = step, step.inputs
        self._counter.restart()
        self._pending.clear()
        self._counts.begin(step.inputs.position_ids[None])

    def end(self) -> None:
        """Make sure that the pass went as the traced one. Raises UnsupportedModelError if it did not."""
        counter, trace = self._counter, self._trace
        if (counter.num_products, counter.num_sdpa) != (trace.num_products, len(self._sdpa)):
            raise UnsupportedModelError("its code took another path than when it was traced")
        self._counts.end()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counter = self._counter
        if func is FLEX:
            return self._answer_flex(*args, **kwargs)
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._answer_sdpa(*args, **kwargs)
        if (answer := self._counts.answer(func, args, kwargs)) is not None:
            return answer
        if (product := counter.product(func, args, kwargs)) is not None:
            place, counter.num_products = counter.num_products, counter.num_products + 1
            if place in self._scores:
                self._pending[self._scores[place]] = (product.left, product.right.transpose(1, 2))
                shape = (product.left.shape[0], product.left.shape[1], product.right.shape[2])
                return StandIn.like(product.restore(product.left.new_empty(shape, device="meta")))
            if place in self._values:
                index = self._values[place]
                query, key = self._pending.pop(index)
                return product.restore(self._attend(index, query, key, product.right))
        elif takes_last_token(func, args):
            place, counter.num_lasts = counter.num_lasts, counter.num_lasts + 1
            if self._trace.gives_last_alone and place == self._trace.last_place:
                wanted = args[0].index_select(1, self._inputs.logits_rows)
                return wanted[0] if args[1][1] == -1 else wanted
        return func(*args, **kwargs)

    def _answer_sdpa(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        index, self._counter.num_sdpa = self._sdpa.get(self._counter.num_sdpa), self._counter.num_sdpa + 1
        if index is None:
            raise UnsupportedModelError("its code attends more often than when it was traced")
        output = self._attend(index, *heads_of(query, key, value))
        return output.view(*query.shape[:-1], -1)

    def _answer_flex(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any,
        block_mask: Any,
        scale: float,
        kernel_options: dict[str, Any],
        *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What adapt/flex.py spells out, without any of it: its two products are answered at once."""
        place, self._counter.num_products = self._counter.num_products, self._counter.num_products + 2
        if place not in self._scores:
            raise UnsupportedModelError("its code attends more often than when it was traced")
        if wants_more(kernel_options):
            raise UnsupportedModelError("it asks flex_attention for more than its output")
        key, value = (repeated(heads, query.shape[1]) for heads in (key, value))
        output = self._attend(self._scores[place], *heads_of(query, key, value))
        nothing = query.new_empty(0)
        return output.view(*query.shape[:-1], -1), nothing, nothing

    def _attend(self, index: int, query_HTD: Tensor, key_HTD: Tensor, value_HTV: Tensor) -> Tensor:
        """Paged attention of one call; returns [H, T, V]."""
        attention = self._attentions[index]
        query_HTD = attention.queries(query_HTD)
        key_TKD, value_TKV = (attention.cached_heads(heads).transpose(0, 1) for heads in (key_HTD, value_HTV))
        query_THD, latent = query_HTD.transpose(0, 1), self._taps.take(index)
        output = self._step.attend(index, query_THD, key_TKD, value_TKV, attention.params, latent)
        output_HTV = output.transpose(0, 1)
        return output_HTV if attention.order is None else output_HTV[attention.order.argsort()]
