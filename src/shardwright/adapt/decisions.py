"""Numbers of the tokens that a module's code looks at while it runs: an early exit, a branch on the largest activation.

One number of all tokens together says something else of those of many requests. Which expert gets a token is looked at
as well, by most code, but in whole numbers and masks, which say it of each token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal", "isclose"}
_LOOKS = {"item", "bool", "float", "int", "tolist"}


class Decisions:
    """Collects single floating-point numbers that code takes out of tensors, or branches on, in one forward pass."""

    def __init__(self) -> None:
        self.numbers: list[float] = []
        self._compared: dict[int, tuple[Tensor, list[float]]] = {}  # tensors are held, so that their ids are theirs

    def observe(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """See a call that was made, and what it gave."""
        name = func.__name__.strip("_")
        if name in _COMPARISONS and isinstance(result, Tensor) and result.numel() == 1:
            self._compared[id(result)] = (result, [number for value in args for number in _numbers(value)])
        elif name in _LOOKS and args and isinstance(args[0], Tensor):
            _, compared = self._compared.get(id(args[0]), (None, _numbers(args[0])))
            self.numbers += compared


def _numbers(value: Any) -> list[float]:
    is_one = isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1
    return [float(value.detach())] if is_one and value.device.type != "meta" else []
