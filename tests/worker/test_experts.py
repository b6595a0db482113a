"""Transformers' experts are multiplied together: measured, its grouped products are the fastest way on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.adapt.models import make_model
from torch.overrides import TorchFunctionMode

from shardwright.worker.ladder import climb
from shardwright.worker.self_check import check_logits, plain_logits

NUM_EXPERTS = 8


class ProductCounter(TorchFunctionMode):
    """Counts products of all experts at once."""

    num_grouped = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_grouped += func is torch._grouped_mm
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_has_two_products_for_each_layer_of_experts(dtype: torch.dtype) -> None:
    sizes = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    module = make_model("qwen3_moe", initializer_range=0.2, **sizes).to(dtype)
    options: dict[str, Any] = {"vocab_size": 128, "block_size": 4, "dtype": dtype}
    expected = plain_logits(module, vocab_size=128)
    model = climb(module, num_positions=64, compute_dtype=torch.float32, device=torch.device("cpu"), **options)
    with ProductCounter() as counter:
        check_logits(model, expected, **options)
    num_steps, num_layers = 4, 2
    assert counter.num_grouped == 2 * num_layers * num_steps
