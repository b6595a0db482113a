"""What traces of several sizes have in common."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.replay.functions import WIDTH, recording_of, table_of, trace_of

from shardwright.replay.affine import Affine, pruned


@given(base=st.integers(-5, 5), slope=st.integers(-5, 5), factor=st.integers(-3, 3), count=st.integers(0, 99))
def test_arithmetic(base: int, slope: int, factor: int, count: int) -> None:
    number = Affine(base, slope)
    assert (number * factor + number).at(count) == number.at(count) * (factor + 1)


def test_sizes_are_functions_of_the_number_of_tokens() -> None:
    recording = recording_of(
        lambda x, _: x.view(1, len(x), 3, 8).transpose(1, 2).reshape(3, -1) * 2, table_of(torch.float32)
    )
    assert [(s.base, s.slope) for s in recording.output.sizes] == [(3, 0), (0, 8)]
    assert [(s.base, s.slope) for s in recording.output.strides] == [(0, 8), (1, 0)]
    (result,) = (s for n, s in enumerate(recording.storage_bytes) if n == recording.output.storage)
    assert (result.base, result.slope) == (0, 4 * WIDTH)


def test_what_nobody_uses_and_views_are_left_out() -> None:
    def function(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mask = (positions[:, None] >= positions[None]).float().log()
        assert mask.shape == (len(x), len(x))
        return (x.T.T.view(-1, 2, 12) + 1).flatten(1)

    trace = pruned(trace_of(function, table_of(torch.float32), 4))
    assert [str(call.function) for call in trace.calls] == ["aten.embedding.default", "aten.add.Tensor"]


def test_code_that_looks_at_numbers_is_kept_for_the_error() -> None:
    trace = pruned(trace_of(lambda x, p: x * 2 if int(p[0]) >= 0 else x, table_of(torch.float32), 4))
    assert "aten._local_scalar_dense.default" in [str(call.function) for call in trace.calls]
