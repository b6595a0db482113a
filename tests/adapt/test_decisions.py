"""Numbers that code looks at are told from masks and whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwright.adapt.decisions import Decisions

X = torch.tensor([[0.5, -3.0], [2.0, 1.0]])


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.decisions = Decisions()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.decisions.observe(func, args, result)
        return result


LOOKS: dict[str, tuple[Callable[[Tensor], Any], list[float]]] = {
    "branch": (lambda x: 1 if x.abs().max() > 2 else 0, [3.0]),
    "two numbers": (lambda x: bool(x[0, 0] < x[1, 0]), [0.5, 2.0]),
    "item": (lambda x: x.sum().item(), [0.5]),
    "float": (lambda x: float(x.amax()), [2.0]),
    "any of a mask": (lambda x: bool((x > 1).any()), []),
    "whole number": (lambda x: int(x.argmax()), []),
    "nothing": (lambda x: torch.where(x.max() > 1, x, -x), []),
}


@pytest.mark.parametrize(("look", "expected"), LOOKS.values(), ids=LOOKS)
def test_numbers_that_are_looked_at(look: Callable[[Tensor], Any], expected: list[float]) -> None:
    with Watching() as mode:
        look(X)
    assert mode.decisions.numbers == expected
