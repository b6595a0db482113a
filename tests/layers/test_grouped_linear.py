from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardwright.kernels.packed_linear import pack_weight
from shardwright.layers import grouped_linear
from shardwright.layers.grouped_linear import ExpertMatrices, group_by_expert

NUM_EXPERTS, IN, OUT = 5, 24, 40
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def rows_and_ends(counts: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = torch.randn(sum(counts), IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    return rows, torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("num_tokens", [1, 2, 17])
def test_choices_in_the_order_of_experts(num_tokens: int) -> None:
    chosen = torch.randint(NUM_EXPERTS, (num_tokens, 2), generator=torch.Generator().manual_seed(1))
    tokens, experts, places, ends = group_by_expert(chosen, NUM_EXPERTS)
    assert experts.tolist() == sorted(chosen.flatten().tolist())
    for token in range(num_tokens):
        for k in range(2):
            place = places[2 * token + k]
            assert (int(tokens[place]), int(experts[place])) == (token, int(chosen[token, k]))
    assert ends.dtype is torch.int32
    assert ends.tolist() == [int((chosen <= expert).sum()) for expert in range(NUM_EXPERTS)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", [[3, 0, 1, 0, 20], [0, 0, 0, 0, 1], [7, 7, 7, 7, 7]])
@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize("way", ["plain", "packed", "stacked", "widened"])
def test_rows_meet_the_matrix_of_their_expert(
    dtype: torch.dtype, counts: list[int], is_transposed: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    shape = (NUM_EXPERTS, OUT, IN) if is_transposed else (NUM_EXPERTS, IN, OUT)
    stack = torch.randn(shape, generator=generator).to(dtype)
    matrices = [weight.mT if is_transposed else weight for weight in stack]
    rows, ends = rows_and_ends(counts, dtype)
    if way == "stacked":
        monkeypatch.setattr(grouped_linear, "multiplies_grouped", lambda matrix: True)
    if way == "widened":
        monkeypatch.setattr(grouped_linear, "has_fast_half_products", lambda: False)
    made = ExpertMatrices(matrices, {} if way == "packed" else None)
    expected = torch.cat(
        [part.float() @ matrix.float() for part, matrix in zip(rows.split(counts), matrices, strict=True)]
    )
    output = made.multiply(rows, ends)
    assert output.dtype is dtype
    torch.testing.assert_close(output.float(), expected, atol=10 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_weights_that_are_packed_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = list(torch.randn(NUM_EXPERTS, OUT, IN))
    packed = {weight.data_ptr(): pack_weight(weight) for weight in weights}
    monkeypatch.setattr(grouped_linear, "pack_weight", lambda weight: pytest.fail("packed again"))
    rows, ends = rows_and_ends([1, 2, 3, 4, 5], torch.float32)
    output = ExpertMatrices([weight.mT for weight in weights], packed).multiply(rows, ends)
    parts = rows.split([1, 2, 3, 4, 5])
    torch.testing.assert_close(output, torch.cat([p @ w.mT for p, w in zip(parts, weights, strict=True)]))
