"""How one pipeline stage gives tensors to the next, and what it says when it has none to give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardwright.errors import EngineError

_FAILED, _FINISHED, _BLANK = b"F", b"E", b"B"
_LONGEST_REASON = 2000


class StageLink(Protocol):
    """From a rank of one stage to its counterpart of the next: first in, first out."""

    def send(self, tensors: list[Tensor]) -> None:
        """Give tensors away; they may be written over once the call is back.

        It waits for no receiver that is less than a few messages behind.
        """
        ...

    def recv(self) -> list[Tensor]:
        """The tensors of the oldest message that has not been received; waits for it."""
        ...


class StageFailedError(EngineError):
    """An earlier pipeline stage failed, and has nothing to hand over."""


class StageFinishedError(EngineError):
    """An earlier pipeline stage runs no more forward passes for now, while this one waits for another."""


def send_failure(link: StageLink, reason: str) -> None:
    """Tell the next stage that nothing comes in this forward pass, and why."""
    link.send([_word(_FAILED + reason.encode()[:_LONGEST_REASON])])


def send_finish(link: StageLink) -> None:
    """Tell the next stage that this one has run all forward passes for now."""
    link.send([_word(_FINISHED)])


def send_blank(link: StageLink) -> None:
    """Tell the next stage that in this forward pass nothing is computed: the code is only looked at."""
    link.send([_word(_BLANK)])


def receive(link: StageLink) -> Sequence[Tensor] | None:
    """What the stage before hands over in a forward pass; None if it computed nothing.

    Raises: StageFailedError or StageFinishedError.
    """
    tensors = link.recv()
    word = _said(tensors)
    if word is None:
        return tensors
    if word[:1] == _BLANK:
        return None
    if word[:1] == _FINISHED:
        raise StageFinishedError("an earlier pipeline stage has stopped")
    raise StageFailedError(word[1:].decode(errors="replace"))


def receive_finish(link: StageLink) -> None:
    """Pass over what is left to receive, until the stage before says that it has finished."""
    while True:
        word = _said(link.recv())
        if word is not None and word[:1] == _FINISHED:
            return


def _word(text: bytes) -> Tensor:
    """A message that cannot be taken for tensors of a model: a single one, of bytes."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _said(tensors: Sequence[Tensor]) -> bytes | None:
    """The word that a message is; None if it is tensors of a model."""
    if len(tensors) == 1 and tensors[0].dtype is torch.uint8 and tensors[0].ndim == 1:
        return bytes(tensors[0].tolist())
    return None
