"""Watch a module's forward pass for attention that its code computes itself.

One pass of a known number of tokens runs as its author wrote it. On the way, every call of scaled_dot_product_attention
is noted, and every product of two batches of activations that makes a [tokens, tokens] matrix is followed: through
whatever is done to it, into a softmax, and into the product with the values. Nothing is matched by name, so it does not
matter how scale, mask or cast are spelled. What the numbers mean is worked out in adapt/fit.py; what becomes of counts
of tokens in adapt/counting.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright.adapt.calls import OPENED, CallCounter, takes_last_token
from shardwright.adapt.count_calls import Count, CountCalls, tables_of
from shardwright.adapt.counting import CountFollower, Use
from shardwright.adapt.decisions import Decisions
from shardwright.adapt.flex import FLEX
from shardwright.adapt.followed import AttentionTrace, Followed, follow, followed_in, plain
from shardwright.adapt.products import Product, heads_of, without_product
from shardwright.errors import UnsupportedModelError


@dataclass(slots=True)
class ForwardTrace:
    """What one forward pass showed."""

    attentions: list[AttentionTrace] = field(default_factory=list)
    num_products: int = 0
    counts: dict[Count, Use] = field(default_factory=dict)
    """Calls that count the tokens."""
    row_labels: dict[str, str] = field(default_factory=dict)
    """Of einsums: see adapt/products.py."""
    decisions: list[float] = field(default_factory=list)
    """Numbers that the code looked at."""
    num_rows: int | None = None
    """Fewest rows of the tables that counts are slices of."""
    last_place: int | None = None
    """Of the last call that takes the last token, among such calls."""
    gives_last_alone: bool = False
    """It gives logits of no other."""


class TracingMode(TorchFunctionMode):
    """Lets a forward pass run, and records its attention.

    Args:
        model: the module that runs.
        num_tokens: of the pass; best a number that occurs nowhere else in the model.
        understand: called with the number of each attention, and the attention, once it has met its values; what it
            holds is let go of afterwards: all scores of a model together would be most of its memory.
    """

    def __init__(
        self, model: nn.Module, num_tokens: int, understand: Callable[[int, AttentionTrace], None] = lambda *_: None
    ) -> None:
        super().__init__()
        self._understand = understand
        self._follower = CountFollower(CountCalls(tables_of(model)), num_tokens)
        self._counter = CallCounter(model, num_tokens=num_tokens)
        self._decisions = Decisions()
        self.trace = ForwardTrace(
            counts=self._follower.uses,
            row_labels=self._counter.row_labels.known,
            decisions=self._decisions.numbers,
        )
        self._num_tokens = num_tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counter = self._counter
        if func in OPENED:
            num_before = len(self.trace.attentions)
            with self:
                result = OPENED[func](*args, **kwargs)
            for attention in self.trace.attentions[num_before:]:
                attention.is_flex = func is FLEX
            return result
        if func is F.scaled_dot_product_attention:
            self._note_sdpa(*args, **kwargs)
        elif (product := counter.product(func, args, kwargs)) is not None:
            return self._trace_product(func, args, kwargs, product)
        elif takes_last_token(func, args):
            self.trace.last_place, counter.num_lasts = counter.num_lasts, counter.num_lasts + 1
        result = func(*args, **kwargs)
        self._follower.observe(func, args, kwargs, result)
        self._decisions.observe(func, args, result)
        return result

    def finish(self, num_logits: int) -> None:
        """Note what the whole pass showed, and how many tokens got logits.

        Raises: UnsupportedModelError if it is not known how to get them for all.
        """
        self.trace.num_rows = self._follower.num_rows
        self.trace.gives_last_alone = num_logits == 1 and self._num_tokens > 1
        if self.trace.gives_last_alone and self.trace.last_place is None:
            raise UnsupportedModelError("its forward gives logits of one token alone, in a way that is not understood")

    def _note_sdpa(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        options = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        try:
            heads = [tensor.detach() for tensor in heads_of(query, key, value)]
        except ValueError:
            heads = []
        if not heads or query.shape[-2] != self._num_tokens:
            raise UnsupportedModelError(f"it attends from {tuple(query.shape)} to {tuple(key.shape)}")
        attention = AttentionTrace(
            is_sdpa=True,
            place=self._counter.num_sdpa,
            query=heads[0],
            key=heads[1],
            value=heads[2],
            options=options,
        )
        self._counter.num_sdpa += 1
        self.trace.attentions.append(attention)
        self._complete(attention)

    def _complete(self, attention: AttentionTrace) -> None:
        self._understand(self.trace.attentions.index(attention), attention)
        attention.forget()

    def _trace_product(self, func: Any, args: Any, kwargs: Any, product: Product) -> Any:
        place, self._counter.num_products = self._counter.num_products, self._counter.num_products + 1
        self.trace.num_products = self._counter.num_products
        attention = followed_in((args, kwargs))
        if attention is not None:  # the weights meet the values
            if attention.scores is not None and attention.value is None and isinstance(product.left, Followed):
                attention.value, attention.value_place = plain(product.right).detach(), place
                attention.weights = plain(product.left).detach()
                attention.blank_weights = product.left.blank.detach()
                self._complete(attention)
            with torch._C.DisableTorchFunctionSubclass():
                return plain(func(*args, **kwargs))
        result = func(*args, **kwargs)
        shape = (product.left.shape[1], product.right.shape[2])
        if shape != (self._num_tokens, self._num_tokens):
            return result
        attention = AttentionTrace(
            is_sdpa=False,
            place=place,
            query=product.left.detach(),
            key=product.right.detach().transpose(1, 2),
        )
        self.trace.attentions.append(attention)
        return follow(result, without_product(func, args, kwargs, result), attention)
