"""Ids that code compares with are found in any prompt, whether or not they occur in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.adapt.special_ids import find_special_ids, ordinary_ids

VOCAB_SIZE = 1000
LOWEST = torch.tensor([0, 3])
IS_CONTROL = torch.arange(VOCAB_SIZE) < 5


class Reads(nn.Module):
    """Does something to its token ids, and gives no more than that."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, tokens: Tensor) -> Any:
        return self.what(tokens)


FOUND: dict[str, tuple[Callable[[Tensor], Any], list[int]]] = {
    "==": (lambda t: (t == 7).cumsum(1), [7]),
    "!=": (lambda t: t[:, None, None, :].ne(3), [3]),
    "two": (lambda t: (t == 7) | (t == 9), [7, 9]),
    "below": (lambda t: t.view(-1) < 2, [0, 1]),
    "above": (lambda t: t.to(torch.int32).gt(997), [998, 999]),
    "isin": (lambda t: torch.isin(t, LOWEST), [0, 3]),
    "a tensor": (lambda t: torch.eq(t, torch.tensor(5)), [5]),
    "a branch on the first": (lambda t: 0 if t[0, 0] == 11 else 1, [11]),
    "a table": (lambda t: IS_CONTROL[t], [0, 1, 2, 3, 4]),
    "after arithmetic": (lambda t: (t - 10) == 2, [12]),
    "nothing but looking up": (lambda t: torch.zeros(VOCAB_SIZE, 4)[t], []),
    "halves": (lambda t: t < 500, []),
    "hashing": (lambda t: t % 4 == 1, []),
    "repetitions": (lambda t: t[:, 1:] == t[:, :-1], []),
    "masks of counts": (lambda t: torch.arange(t.shape[1]) == 7, []),
}


@pytest.mark.parametrize(("what", "expected"), FOUND.values(), ids=FOUND)
def test_ids_that_code_compares_with(what: Callable[[Tensor], Any], expected: list[int]) -> None:
    tokens = torch.randint(20, 900, (1, 13), generator=torch.Generator().manual_seed(0))
    assert find_special_ids(Reads(what), tokens, {}, vocab_size=VOCAB_SIZE) == expected


def test_the_others_are_ordinary() -> None:
    assert ordinary_ids(6, [1, 4]).tolist() == [0, 2, 3, 5]
