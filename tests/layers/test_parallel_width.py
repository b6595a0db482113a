"""An input that says that it is narrower than it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardwright.layers.parallel import become
from shardwright.layers.parallel_width import LocalWidthInput
from shardwright.plans.threads import run_ranks

(ALONE,) = run_ranks(1, lambda collectives: collectives)


class Told(nn.Module):
    """Notes what it is told of its input, and returns the input."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        self.seen += [tuple(x.shape), tuple(x.size()), x.size(-1), x.size(dim=2), x.size(0), x.shape[1]]
        return x * 1 if other is None else x + other


def told(width: int, local: int) -> Told:
    module = Told()
    become(module, LocalWidthInput, collectives=ALONE, whole_width=width, local_width=local)
    return module


def test_code_is_told_another_width_and_computes_with_all_of_it() -> None:
    module, x = told(8, 4), torch.rand(2, 3, 8)
    output = module(x)
    assert module.seen == [(2, 3, 4), (2, 3, 4), 4, 4, 2, 3]
    assert type(output) is Tensor
    assert output.shape == (2, 3, 8)
    assert torch.equal(output, x)


def test_only_the_first_input_of_that_width_is_told_of() -> None:
    module, x = told(8, 4), torch.rand(2, 3, 8)
    assert torch.equal(module(x=x, other=x), 2 * x)
    assert module.seen[0] == (2, 3, 4)


def test_inputs_of_other_widths_are_left_alone() -> None:
    module, x = told(8, 4), torch.rand(2, 3, 5)
    assert module(x).shape == (2, 3, 5)
    assert module.seen[0] == (2, 3, 5)
