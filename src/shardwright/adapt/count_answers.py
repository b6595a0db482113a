"""Answer a module's counts of tokens by the positions that the tokens have.

In a packed batch the number of tokens is that of all requests together, so a count, or as many leading rows of a table,
is wrong for all but the first. Each call that counts tokens is known by its place among such calls, and gets what it
stands for (adapt/counting.py) instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwright.adapt.count_calls import Count, CountCall, CountCalls, dtype_of_count
from shardwright.adapt.counting import Use
from shardwright.errors import UnsupportedModelError


class CountAnswers:
    """Answers the counts of one forward pass after another.

    Args:
        calls: numbers them as they were numbered when the module was traced.
        uses: what those stand for that count tokens.
        num_positions: longest sequence that is served.
    """

    def __init__(self, calls: CountCalls, uses: Mapping[Count, Use], num_positions: int) -> None:
        self._calls = calls
        self._uses = uses
        self._num_positions = num_positions
        self._num_counted = 0

    def begin(self, position_ids: Tensor) -> None:
        """Get ready for a forward pass.

        Args:
            position_ids: [B, T] int64, of tokens that the module gets in this shape.
        """
        self._calls.restart()
        self._num_counted = 0
        self._position_ids = position_ids

    def end(self) -> None:
        """Make sure that every count of the traced pass was made. Raises UnsupportedModelError if not."""
        if self._num_counted != len(self._uses):
            raise UnsupportedModelError("its code took another path than when it was traced")

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What a call gets in place of its own result; None if it is to be made as it is.

        Raises: UnsupportedModelError if a call that counted the tokens of the traced pass does not count these.
        """
        call = self._calls.see(func, args, kwargs)
        use = None if call is None else self._uses.get(call.count)
        if call is None or use is None:
            return None
        num_sequences, num_tokens = self._position_ids.shape
        if call.length != num_tokens:
            raise UnsupportedModelError(
                f"its code counts {call.length} where it counted its tokens when it was traced, but has {num_tokens}"
            )
        self._num_counted += 1
        if use is Use.PLACES:
            return None
        if call.count.table == "cumsum" and use is Use.POSITIONS:
            summed: Tensor = func(*args, **kwargs)
            return (self._position_ids + 1).to(summed.dtype).view(summed.shape)  # it begins with one
        if use is Use.POSITIONS and num_sequences > 1:
            raise UnsupportedModelError("its code counts positions, the same ones for all sequences of a batch")
        if call.part is not None:
            return self._rows(call, use)
        if call.count.table is not None:
            raise UnsupportedModelError("its code picks out of a running sum of ones by position")
        return self._positions(dtype_of_count(args, kwargs), use)

    def _positions(self, dtype: torch.dtype, use: Use) -> Tensor:
        if use is Use.WHOLE:
            return torch.arange(self._num_positions, device=self._position_ids.device, dtype=dtype)
        return self._position_ids[0].to(dtype, copy=True)  # the code may change it in place

    def _rows(self, call: CountCall, use: Use) -> Tensor:
        assert call.table is not None
        assert call.part is not None
        rows = call.table if use is Use.WHOLE else call.table.index_select(call.part.dim, self._position_ids[0])
        return rows[call.part.without_stop()]


class AnsweringMode(TorchFunctionMode):
    """While open, counts are answered, and all else is as the code has it."""

    def __init__(self, answers: CountAnswers) -> None:
        super().__init__()
        self._answers = answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = self._answers.answer(func, args, kwargs)
        return func(*args, **kwargs) if answer is None else answer
