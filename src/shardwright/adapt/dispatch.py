"""Our entry in Transformers' attention interface.

Modeling code looks its attention function up by name in `ALL_ATTENTION_FUNCTIONS` and its mask function in
`ALL_MASK_ATTENTION_FUNCTIONS`. Two names are registered:
  * SERVE has no mask function, so models build no masks at all: causality and windows are ours;
  * PROBE has one, which tells what mask each layer would have been given (see adapt/probe.py).
Nothing but the function's arguments reaches it from the runner, so the handler of the forward pass in progress is held
here, opened with `handling` around one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

SERVE = "shardwright"
PROBE = "shardwright_probe"


class AttentionHandler(Protocol):
    """What becomes of the attention calls of one forward pass."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """One attention call.

        Args:
            module: the caller.
            query: [1, H, T, D].
            key, value: [1, K, T, D], of the tokens of this forward.
            mask: what the code passed as attention mask.
            options: the call's other keyword arguments (scaling, sliding_window, softcap, s_aux, ...).

        Returns: [1, T, H, V].
        """
        ...

    def make_mask(self, mask_function: Callable[..., Any], options: dict[str, Any]) -> Tensor | None:
        """The mask for layers that will see `mask_function(batch, head, query, key) -> bool`."""
        ...


_handlers: list[AttentionHandler] = []


@contextmanager
def handling(handler: AttentionHandler) -> Iterator[None]:
    """Route the attention calls of forward passes inside to `handler`."""
    _handlers.append(handler)
    try:
        yield
    finally:
        _handlers.pop()


@contextmanager
def blank_masks() -> Iterator[None]:
    """While open, masks that Transformers makes for "eager" attention let everything through, and take no memory.

    For code that adds a mask to scores which nobody computes. The true mask would look at positions, see several
    sequences in them, and be built in another way than for one.
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        with eager_masks(_blank_mask):
            yield
    finally:
        masking_utils.find_packed_sequence_indices = find


@contextmanager
def eager_masks(make: Callable[..., Tensor]) -> Iterator[None]:
    """While open, masks for "eager" attention are made by `make`."""
    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = make
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]


def _blank_mask(
    *, batch_size: int, q_length: int, kv_length: int, dtype: torch.dtype, device: torch.device, **_: Any
) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device).expand(batch_size, 1, q_length, kv_length)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    return _handlers[-1].attend(module, query, key, value, attention_mask, options), None


def _mask(mask_function: Callable[..., Any], **options: Any) -> Tensor | None:
    return _handlers[-1].make_mask(mask_function, options)


def register() -> None:
    """Make both names known to Transformers; once is enough, more does no harm."""
    AttentionInterface.register(SERVE, _attention)
    AttentionInterface.register(PROBE, _attention)
    AttentionMaskInterface.register(PROBE, _mask)


def keep_from_compiler() -> None:
    """Leave attention out of layers that are compiled."""
    AttentionInterface.register(SERVE, torch.compiler.disable(_attention))
