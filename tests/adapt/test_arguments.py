"""What a module's forward demands beside tokens, it gets, if its name says what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.adapt.arguments import plain_arguments, with_positions

TOKENS = torch.tensor([[7, 8, 9]])


def module_with(forward: Callable[..., Any]) -> nn.Module:
    module = nn.Identity()
    module.forward = forward
    return module


ASKED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "nothing": (lambda x: x, {}),
    "only with defaults": (lambda x, mask=None, start_pos=3: x, {}),
    "a cache": (lambda x, use_cache=True: x, {"use_cache": False}),
    "anything": (lambda x, *args, **kwargs: x, {"use_cache": False}),
    "a start": (lambda tokens, start_pos: tokens, {"start_pos": 0}),
    "a length": (lambda tokens, *, past_len: tokens, {"past_len": 0}),
    "an empty past": (lambda x, past_key_values, targets: x, {"past_key_values": None, "targets": None}),
    "unknown": (lambda x, pixels: x, {}),
}


@pytest.mark.parametrize(("forward", "expected"), ASKED.values(), ids=ASKED)
def test_what_is_demanded(forward: Callable[..., Any], expected: dict[str, Any]) -> None:
    assert plain_arguments(module_with(forward), TOKENS) == expected


@pytest.mark.parametrize("name", ["mask", "attention_mask", "padding_mask"])
def test_masks_hide_nothing(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def forward(x, {name}): return x", namespace)
    assert plain_arguments(module_with(namespace["forward"]), TOKENS)[name].tolist() == [[1, 1, 1]]


def test_positions_begin_at_zero_and_can_be_others() -> None:
    def forward(tokens: Tensor, positions: Tensor, input_pos: Tensor) -> Tensor:
        return tokens

    arguments = plain_arguments(module_with(forward), TOKENS)
    assert {name: value.tolist() for name, value in arguments.items()} == {
        "positions": [[0, 1, 2]],
        "input_pos": [0, 1, 2],
    }
    arguments = with_positions(arguments, torch.tensor([4, 0, 1]))
    assert {name: value.tolist() for name, value in arguments.items()} == {
        "positions": [[4, 0, 1]],
        "input_pos": [4, 0, 1],
    }
