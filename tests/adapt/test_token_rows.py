"""What is kept of a token comes back as it was, whatever its type is and whatever the type of the cache."""

from __future__ import annotations

import pytest
import torch

from shardwright.adapt.token_rows import TokenTensor

VALUES = {
    torch.float32: torch.randn(1, 2, 5, 3),
    torch.bfloat16: torch.randn(1, 2, 5, 3).bfloat16(),
    torch.int64: torch.randint(-(2**60), 2**60, (1, 2, 5, 3)),
    torch.bool: torch.rand(1, 2, 5, 3) < 0.5,
}


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("cached", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("token_dim", [1, 2])
def test_rows_are_the_same_tensor_again(dtype: torch.dtype, cached: torch.dtype, token_dim: int) -> None:
    tensor = VALUES[dtype]
    kept = TokenTensor((1, 2, 5, 3), token_dim, dtype)
    rows = kept.rows(tensor, cached)
    assert rows.dtype is cached
    assert rows.shape == (tensor.shape[token_dim], kept.width(cached))
    again = kept.tensor(rows)
    assert again.dtype is dtype
    assert torch.equal(again, tensor)
    assert again.is_contiguous()


def test_another_number_of_tokens_keeps_its_shape() -> None:
    kept = TokenTensor((1, 2, 5, 3), 2, torch.float32)
    tensor = torch.randn(1, 2, 9, 3)
    rows = kept.rows(tensor, torch.float32)
    assert rows.shape == (9, 6)
    assert torch.equal(kept.tensor(rows[4:7]), tensor[:, :, 4:7])


def test_sequences_of_a_batch_come_one_after_another() -> None:
    kept = TokenTensor((1, 2, 5, 3), 2, torch.float32, batch_dim=0)
    tensor = torch.randn(4, 2, 5, 3)
    rows = kept.rows(tensor, torch.bfloat16)
    assert rows.shape == (4 * 5, 2 * 6)
    assert torch.equal(kept.tensor(rows, 4), tensor)
    assert torch.equal(kept.tensor(rows[5:10]), tensor[1:2])
