"""Where in a pass of a block the experts' outputs have become one tensor, which is all that goes on from there.

What a call does is told by the storages that it reads, writes and makes, so code may add up in place or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree

from shardwright.errors import UnsupportedModelError
from shardwright.experts.watch import INPUT, BlockMode, Key
from shardwright.replay.affine import is_view, tensors_in
from shardwright.replay.trace import SeenCall, SeenTensor


@dataclass(frozen=True, slots=True)
class Cut:
    """After a call, one storage holds all that the experts gave."""

    after: int
    """Number of the call."""
    storage: int
    is_added: bool
    """Whether the storage was there before the experts ran, and they are added to what is in it."""


class Region:
    """What in a pass depends on the experts.

    Args:
        mode: of the pass; its visits are known.

    Raises: UnsupportedModelError if no expert ran.
    """

    def __init__(self, mode: BlockMode) -> None:
        if not mode.visits:
            raise UnsupportedModelError("no expert ran on its own")
        self._mode = mode
        self.calls = mode.trace.calls
        self.first = min(visit.first for visit in mode.visits)
        self.last = max(visit.last for visit in mode.visits)
        self.reads = [{t.storage for t in tensors_in((call.args, call.kwargs), SeenTensor)} for call in self.calls]
        self.makes = [{t.storage for t in tensors_in(call.output, SeenTensor)} for call in self.calls]
        leaves, self.result_spec = _pytree.tree_flatten(mode.result)
        self.results = [mode.look_at(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        """Leaves of what the block returns."""
        self.depends, self._since = self._follow_experts()

    def has_effect(self, number: int, live: set[int]) -> bool:
        """Whether a call makes or writes one of some storages."""
        reads, makes = self.reads[number], self.makes[number]
        return bool(makes & live) and not is_view(self.calls[number], reads, makes)

    @property
    def wanted(self) -> set[int]:
        """Storages of the results."""
        return {t.storage for t in tensors_in(self.results, SeenTensor)}

    @cached_property
    def makers(self) -> dict[int, Key]:
        """Which call makes a storage."""
        found: dict[int, Key] = {self._mode.trace.inputs[INPUT]: (-1, 0)}
        seen: set[int] = set()
        for number, call in enumerate(self.calls):
            seen |= self.reads[number]
            for leaf, tensor in enumerate(tensors_in(call.output, SeenTensor)):
                if tensor.storage not in seen:
                    found.setdefault(tensor.storage, (number, leaf))
        return found

    def seen(self, key: Key) -> SeenTensor:
        """How a tensor lies that the pass made."""
        if key[0] < 0:
            return self._mode.look_at(self._mode.input)
        found: SeenTensor = tensors_in(self.calls[key[0]].output, SeenTensor)[key[1]]
        return found

    def cuts(self) -> list[Cut]:
        """All places where one storage holds what the experts gave, in order."""
        live, found = self.wanted, []
        for number in range(len(self.calls) - 1, self.last - 1, -1):
            carrying = [s for s in live if self._since.get(s, len(self.calls)) <= number]
            if len(carrying) == 1 and self.depends[number] and carrying[0] in self.makers:
                maker = self.makers[carrying[0]][0]
                if maker >= 0:
                    found.append(Cut(number, carrying[0], is_added=not self.depends[maker]))
            if self.has_effect(number, live):
                live = live | self.reads[number]
        return found[::-1]

    def made_before(self, number: int) -> Iterator[Key]:
        """The input, and tensors that calls before one made without the experts."""
        yield (-1, 0)
        for earlier in range(number):
            if not self.depends[earlier]:
                yield from ((earlier, leaf) for leaf in range(len(self._mode.outputs[earlier])))

    def _follow_experts(self) -> tuple[list[bool], dict[int, int]]:
        """Which calls depend on experts, and from which call on a storage does."""
        since: dict[int, int] = {}
        depends = []
        taking = {number for visit in self._mode.visits for number in visit.calls.values()}
        for number in range(len(self.calls)):
            depends.append(number in taking or any(s in since for s in self.reads[number]))
            if depends[-1]:
                for storage in self.makes[number]:
                    since.setdefault(storage, number)
        return depends, since

    def looks_at_numbers(self, chosen: Key) -> SeenCall | None:
        """A call that looks at numbers which depend on the block's input, but not on the chosen experts, nor on what
        they give; whatever it decides would not be decided again.
        """
        of_input = {self._mode.trace.inputs[INPUT]}
        of_choice: set[int] = set()
        for number, call in enumerate(self.calls):
            is_look = not self.makes[number] and not self.depends[number]
            if is_look and self.reads[number] & of_input and not self.reads[number] & of_choice:
                return call
            if self.reads[number] & of_input:
                of_input |= self.makes[number]
            if self.reads[number] & of_choice:
                of_choice |= self.makes[number]
            if number == chosen[0]:
                of_choice.add(self.seen(chosen).storage)
        return None


def tokens_first(tensor: Any, num_tokens: int) -> bool:
    """Whether a tensor has a row for each token: [T, ...] or [1, T, ...]."""
    shape = tuple(tensor.shape)
    return shape[:1] == (num_tokens,) or shape[:2] == (1, num_tokens)
