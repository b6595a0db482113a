"""Loops of native kernels are shared out by claims (native/threads.h): among as many threads as there are, or more."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from shardwright.kernels.packed_linear import pack_weight, packed_linear

MORE_THAN_CORES = 7
ROUNDS = 200
OUTER = 200


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Gives torch its threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def operands() -> tuple[Tensor, Tensor]:
    """[23, 96] inputs of four tiles, and a packed weight of more panels than threads have pieces."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(23, 96, generator=generator), pack_weight(torch.randn(OUTER, 96, generator=generator))


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("threads", [2, MORE_THAN_CORES])
def test_every_piece_is_done_once_whoever_comes(threads: int, operands: tuple[Tensor, Tensor]) -> None:
    torch.set_num_threads(1)
    expected = packed_linear(*operands, None, OUTER)
    torch.set_num_threads(threads)
    for _ in range(ROUNDS):
        assert torch.equal(packed_linear(*operands, None, OUTER), expected)


def test_calls_of_several_threads_do_not_meet(operands: tuple[Tensor, Tensor]) -> None:
    x, weight = operands
    inputs = [x * factor for factor in (1.0, 2.0, 4.0)]
    expected = [packed_linear(each, weight, None, OUTER) for each in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        for _ in range(ROUNDS):
            found = pool.map(lambda each: packed_linear(each, weight, None, OUTER), inputs)
            assert all(map(torch.equal, found, expected))
