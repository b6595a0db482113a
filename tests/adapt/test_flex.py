"""flex_attention spelled out gives what it gives itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, and_masks, create_block_mask, flex_attention
from torch.overrides import TorchFunctionMode

from shardwright.adapt.eager import eager
from shardwright.adapt.flex import FLEX, attend_openly

NUM_TOKENS, DIM = 13, 8
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


class Openly(TorchFunctionMode):
    """Answers calls of flex_attention by what is to be tested."""

    num_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not FLEX:
            return func(*args, **(kwargs or {}))
        self.num_calls += 1
        return attend_openly(*args, **(kwargs or {}))


def past(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query - key < 5


def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return torch.where(query >= key, torch.tanh(score) - SLOPES[head] * (query - key), -float("inf"))


def masked(mask: Callable[..., Tensor]) -> dict[str, Any]:
    return {"block_mask": create_block_mask(mask, None, None, NUM_TOKENS, NUM_TOKENS, device="cpu")}


@pytest.mark.parametrize(
    "options",
    [{}, masked(past), masked(and_masks(past, near)), {"score_mod": alibi, "scale": 0.7}],
    ids=["all", "causal", "window", "alibi"],
)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@torch.inference_mode()
def test_it_gives_the_same(options: dict[str, Any], num_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, NUM_TOKENS, DIM, generator=generator)
    key, value = (torch.randn(1, num_kv_heads, NUM_TOKENS, DIM, generator=generator) for _ in range(2))
    attend = eager(
        lambda: flex_attention(query, key, value, enable_gqa=True, return_aux=AuxRequest(lse=True), **options)
    )
    expected = attend()
    with Openly() as mode:
        actual = attend()
    assert mode.num_calls == 1
    torch.testing.assert_close(actual, expected)
