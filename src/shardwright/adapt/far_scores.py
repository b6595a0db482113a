"""What a module's code adds to attention scores at far positions, found without computing anything that far.

A pass of many tokens runs with stand-ins for all that is computed from the tokens. Masks and biases, which code makes
of positions, are real, and what they do to scores is looked at for a few queries. Values that decide on the way, such
as which expert a token goes to, are taken to be zero. What else meets the tokens, such as rotary angles or a scale, is
noted for the first of them: it may not depend on how many more come.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from shardwright.adapt.calls import OPENED, CallCounter
from shardwright.adapt.counting import tensors_in
from shardwright.adapt.followed import POWERS, SOFTMAXES, is_in_place
from shardwright.adapt.observe import held_tensors
from shardwright.adapt.products import ADDED, without_product
from shardwright.adapt.stand_in import StandIn, answer_of_zeros
from shardwright.adapt.trace import ForwardTrace
from shardwright.errors import UnsupportedModelError
from shardwright.layers.packed_linear import LINEAR_OPERATORS

_BY_ELEMENT = {
    "add", "iadd", "radd", "sub", "isub", "rsub", "subtract", "mul", "imul", "rmul", "multiply", "div", "itruediv",
    "truediv", "divide", "true_divide", "neg", "abs", "where", "masked_fill", "tanh", "atan", "float", "half", "double",
    "bfloat16", "to", "type", "type_as", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "dropout",
    "clone", "contiguous", "detach", "nan_to_num", "setitem", "cat", "concat", "softmax", "exp", "exp2", "max", "amax",
    "sum", "logsumexp", "log_softmax", "getitem", "permute", "transpose",
}  # fmt: skip
"""Functions, without underscores, that treat the rows of scores alike, if these come out where they were."""

_TYPES = {"to", "type", "type_as"}
"""Those of them that may take the type of another tensor."""

_ALIKE = {"ones_like", "zeros_like", "full_like", "empty_like"}
_SHAPES = {"view", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
_LOOKUPS = {F.embedding: (1, 0), torch.Tensor.__getitem__: (0, 1), torch.index_select: (0, 2)}
"""Functions that look tokens up, and the places of table and index among their arguments."""


NUM_NOTED = 5
"""So many of the first tokens are looked at for what meets them."""

SAME = 1e-3
"""So near, relative to their size, are numbers that are the same but for rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """One call in which the tokens met something that is not made of them."""

    name: str
    """Of the function."""
    values: list[Tensor]

    def is_same(self, other: Meeting) -> bool:
        """Whether another pass had the same here."""
        if self.name != other.name or len(self.values) != len(other.values):
            return False
        return all(map(_is_near, self.values, other.values))


def _is_near(one: Tensor, other: Tensor) -> bool:
    if not (one.numel() and other.numel()):  # something else, which is as long as one of the prompts by accident
        return True
    if one.shape != other.shape:
        return False
    dtype = torch.complex128 if one.is_complex() else torch.float64
    return torch.allclose(one.to(dtype), other.to(dtype), rtol=SAME, atol=SAME / 100, equal_nan=True)


class FarMode(TorchFunctionMode):
    """Lets a forward pass run without its tokens, and notes what its code adds to scores.

    Args:
        module: that runs.
        trace: which calls matter.
        rows: [R] int64, queries that are looked at.
        num_tokens: of the pass.
        vocab_size: number of token ids.
        patience_s: how long the pass may take, by the clock of this process: code that goes from token to token takes
            very long.
    """

    def __init__(
        self,
        module: nn.Module,
        trace: ForwardTrace,
        rows: Tensor,
        *,
        num_tokens: int,
        vocab_size: int,
        patience_s: float = math.inf,
    ) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        """By number of the attention: [H or 1, R, T], masks of boolean type or what is added; columns of sinks too."""
        self.largest_bytes = 0
        """Of a tensor that the pass made."""
        self.met: list[Meeting] = []
        """What met the tokens, call by call."""
        self.rows, self.num_tokens = rows, num_tokens
        self.is_late = False
        """It took longer than it may."""
        self._deadline = time.process_time() + patience_s
        self._patience_s = patience_s
        self._vocab_size = vocab_size
        self._held = {id(tensor): tensor for tensor in held_tensors(module)}
        self._counter = CallCounter(module, row_labels=trace.row_labels)
        self._sdpa = {a.place: i for i, a in enumerate(trace.attentions) if a.is_sdpa}
        self._scores = {a.place: i for i, a in enumerate(trace.attentions) if not a.is_sdpa}
        self._values = {a.value_place for a in trace.attentions if a.value_place is not None}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counter = self._counter
        if time.process_time() > self._deadline:
            self.is_late = True
            raise UnsupportedModelError(f"a pass of {self.num_tokens:,} tokens takes more than {self._patience_s:g} s")
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        if getattr(func, "__self__", None) is torch.Tensor.device and isinstance(args[0], StandIn):
            return self.rows.device  # where code makes its masks
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if (product := counter.product(func, args, kwargs)) is not None:
            place, counter.num_products = counter.num_products, counter.num_products + 1
            if place in self._scores or place in self._values:
                shape = (product.left.shape[0], product.left.shape[1], product.right.shape[2])
                result = StandIn.like(product.restore(torch.empty(shape, dtype=product.left.dtype, device="meta")))
                is_added = func in ADDED and isinstance(args[0] if args else kwargs["input"], StandIn)
                if place in self._values or is_added or result.shape[-2:] != (self.num_tokens, self.num_tokens):
                    return result
                zeros = torch.zeros(*result.shape[:-2], len(self.rows), self.num_tokens, device=self.rows.device)
                blank = without_product(func, self.picked(args), self.picked(kwargs), zeros)
                return FarScores.of(result, blank, self._scores[place], self)
        self._note_meeting(func, args, kwargs)
        if self._is_of_tokens(func, args):
            return StandIn.like(func(*_pytree.tree_map_only(Tensor, lambda t: t.to("meta"), args), **kwargs))
        args = self._real(func, args)
        result = func(*args, **kwargs) if (answer := answer_of_zeros(func, args)) is None else answer[0]
        sizes = (t.numel() * t.element_size() for t in tensors_in(result) if t.device.type != "meta")
        self.largest_bytes = max(self.largest_bytes, *sizes, 0)
        return result

    def _note_meeting(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note the numbers, and the first rows of tables as long as the prompt, that a call brings to the tokens.

        What is added to scores is looked at as a whole; a number that changes with the row does not matter there.
        """
        tensors = list(tensors_in((args, kwargs)))
        if not any(isinstance(tensor, StandIn) for tensor in tensors):
            return
        numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, float)]
        tables = [] if any(isinstance(tensor, FarScores) for tensor in tensors) else tensors
        tables = [table for table in tables if not isinstance(table, StandIn) and id(table) not in self._held]
        beginnings = [self._beginning(table) for table in tables]
        if numbers or beginnings:
            self.met.append(Meeting(func.__name__, [*map(torch.tensor, numbers), *beginnings]))

    def _beginning(self, table: Tensor) -> Tensor:
        """What a table has for the first tokens; nothing of one of another length."""
        is_long = self.num_tokens in table.shape
        if table.numel() != 1 and not is_long:
            return torch.empty(0)
        for dim, size in enumerate(table.shape):
            if size == self.num_tokens:
                table = table.narrow(dim, 0, min(NUM_NOTED, size))
        return table.detach().clone()

    def _real(self, func: Any, args: Any) -> Any:
        """Arguments of a call that only takes type and shape from a stand-in: with real tensors in place of those."""
        name, device = func.__name__, self.rows.device
        if name in _TYPES and not isinstance(args[0], StandIn):
            return _pytree.tree_map_only(StandIn, lambda t: torch.empty((), dtype=t.dtype, device=device), args)
        if name.startswith("new_") and isinstance(args[0], StandIn):
            return (torch.empty((), dtype=args[0].dtype, device=device), *args[1:])
        if name in _ALIKE and isinstance(args[0], StandIn) and args[0].shape[-2:] == (self.num_tokens,) * 2:
            shape = (*[1] * (args[0].ndim - 2), self.num_tokens, self.num_tokens)  # all heads are alike
            return (torch.empty(shape, dtype=args[0].dtype, device=device), *args[1:])
        return args

    def picked(self, value: Any) -> Any:
        """Arguments of a call with only those rows of its tensors that are looked at."""

        def pick(tensor: Tensor) -> Tensor:
            if isinstance(tensor, FarScores):
                return tensor.blank
            if isinstance(tensor, StandIn):
                return torch.empty((), dtype=tensor.dtype)  # which is all that is known of it
            if tensor.ndim >= 2 and tensor.shape[-2] == self.num_tokens:
                return tensor.index_select(-2, self.rows)
            return tensor

        return _pytree.tree_map_only(Tensor, pick, value)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Tensor:
        place, self._counter.num_sdpa = self._counter.num_sdpa, self._counter.num_sdpa + 1
        if is_causal:
            attn_mask = (torch.arange(self.num_tokens, device=self.rows.device) <= self.rows[:, None])[None]
            self.found[self._sdpa[place]] = attn_mask
        elif attn_mask is not None and not isinstance(attn_mask, StandIn) and place in self._sdpa:
            mask = attn_mask.expand(*attn_mask.shape[:-1], self.num_tokens)
            rows = self.picked(mask).expand(*mask.shape[:-2], len(self.rows), self.num_tokens)
            self.found[self._sdpa[place]] = rows.reshape(-1, len(self.rows), self.num_tokens)
        return StandIn.like(torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device="meta"))

    def _is_of_tokens(self, func: Any, args: Any) -> bool:
        """Whether a call looks tokens up in the vocabulary, or goes on from what is as long as they are."""
        if func in _LOOKUPS and len(args) > max(_LOOKUPS[func]):
            table, index = (args[place] for place in _LOOKUPS[func])
            if not isinstance(index, Tensor) or not isinstance(table, Tensor) or index.dtype != torch.int64:
                return False
            return bool(index.numel() == self.num_tokens and table.shape[0] >= self._vocab_size)
        if func not in LINEAR_OPERATORS or isinstance(args[0], StandIn):
            return False
        return bool(args[0].numel() == self.num_tokens * args[0].shape[-1] and self.num_tokens in args[0].shape[:-1])


class FarScores(StandIn):
    """Scores that nobody computes, and what they would be for a few queries if all products were zero."""

    blank: Tensor
    number: int
    watch: FarMode

    @classmethod
    def of(cls, meta: Tensor, blank: Tensor, number: int, watch: FarMode) -> FarScores:
        """Scores in place of those on "meta".

        Args:
            meta: [..., T, T].
            blank: [..., R, T].
            number: of the attention.
            watch: that looks at them.
        """
        scores: FarScores = meta.as_subclass(cls)
        scores.blank, scores.number, scores.watch = blank, number, watch
        return scores

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        owner = next(tensor for tensor in tensors_in((args, kwargs)) if isinstance(tensor, FarScores))
        if func in SOFTMAXES or func in POWERS:
            owner._note(args[0] if args else kwargs["input"], POWERS.get(func, 1.0))
        blank = owner._blank_after(func, args, kwargs)
        result = StandIn.__torch_function__(func, types, args, kwargs)
        if func.__name__.strip("_") in _SHAPES and isinstance(result, Tensor):
            shape = (*result.shape[:-2], len(owner.watch.rows), result.shape[-1])
            is_kept = result.shape[-2:-1] == (owner.watch.num_tokens,) and owner.blank.numel() == math.prod(shape)
            blank = owner.blank.reshape(shape) if is_kept else None
        return owner._followed(result, blank)

    def _blank_after(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a call makes of the blank scores; None if it is not known to treat all rows alike."""
        name = func.__name__.strip("_")
        has_others = any(isinstance(t, StandIn) and not isinstance(t, FarScores) for t in tensors_in((args, kwargs)))
        if name not in _BY_ELEMENT or (has_others and name not in _TYPES):
            if is_in_place(func):
                raise UnsupportedModelError(f"its scores are changed by {func.__name__}")
            return None
        with torch._C.DisableTorchFunctionSubclass():
            return func(*self.watch.picked(args), **self.watch.picked(kwargs))

    def _followed(self, result: Any, blank: Any) -> Any:
        if blank is None or next(tensors_in(result), None) is None:
            return result

        def follow(one: Any, other: Any) -> Any:
            has_rows = isinstance(one, Tensor) and one.ndim >= 2 and one.shape[-2] == self.watch.num_tokens
            shape = (*one.shape[:-2], len(self.watch.rows), one.shape[-1]) if has_rows else None
            return FarScores.of(one, other, self.number, self.watch) if has_rows and other.shape == shape else one

        return _pytree.tree_map(follow, result, blank)

    def _note(self, scores: Any, factor: float) -> None:
        if isinstance(scores, FarScores) and scores.shape[-1] >= self.watch.num_tokens:
            rows = scores.blank.reshape(-1, *scores.blank.shape[-2:]) * factor
            self.watch.found.setdefault(scores.number, rows)
