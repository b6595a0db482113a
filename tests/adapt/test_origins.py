"""Elements are followed through whatever moves them, and through nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shardwright.adapt import origins
from shardwright.adapt.origins import OriginsMode

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(4, 2, 3).transpose(0, 1)[:, 1:],
    "reshape": lambda x: x.t().reshape(3, 8),
    "contiguous": lambda x: x.t().contiguous(),
    "to": lambda x: x.double().float(),
    "cat": lambda x: torch.cat([x[:, 2:], x[:, :2]], dim=1),
    "stack": lambda x: torch.stack([x, x.flip(0)], dim=1),
    "expand": lambda x: x[:, None].expand(-1, 2, -1).reshape(4, -1),
    "repeat": lambda x: x.repeat(2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0], device=x.device)),
    "chunks": lambda x: x.chunk(2, dim=1)[1].clone(),
    "copy_": lambda x: copied_into_parts(x),
    "setitem": lambda x: assigned_to_parts(x),
}


def copied_into_parts(x: Tensor) -> Tensor:
    whole = x.new_empty(4, 7)
    whole[:, :6].copy_(x)
    whole[:, 6:].copy_(x[:, :1])
    return whole


def assigned_to_parts(x: Tensor) -> Tensor:
    whole = torch.zeros(2, 4, 6, device=x.device)
    whole[0] = x
    whole[1, :, ::2] = x[:, 3:]
    whole[1, :, 1::2] = x[:, :3]
    return whole


@torch.inference_mode()
@pytest.mark.parametrize(
    ("device", "move"),
    [(device, move) for device in ("cpu", "meta") for move in MOVES if (device, move) != ("meta", "index_select")],
)
def test_moved_elements_keep_their_tags(device: str, move: str) -> None:
    numbers = torch.arange(24.0).view(4, 6)
    expected = MOVES[move](numbers)
    mode = OriginsMode()
    x = numbers.to(device)
    with mode:
        tags = mode.of(x).clone()
        moved = mode.of(MOVES[move](x))
    assert torch.equal(moved, tags.flatten()[expected.long()])


@torch.inference_mode()
def test_what_an_index_on_meta_selects_is_not_known() -> None:
    mode = OriginsMode()
    x = torch.empty(4, 6, device="meta")
    with mode:
        tags = mode.of(x).clone()
        selected = mode.of(MOVES["index_select"](x))
    assert selected.shape == (4, 2)
    assert not torch.isin(selected, tags).any()


@torch.inference_mode()
def test_computed_elements_are_new_ones() -> None:
    mode = OriginsMode()
    with mode:
        x = torch.ones(3)
        tags = mode.of(x).clone()
        for made in (x + 1, x * 1, torch.ones(3), x.exp(), torch.where(x > 0, x, x)):
            assert not torch.isin(mode.of(made), tags).any()
        y = x.clone()
        assert torch.equal(mode.of(y), tags)
        y.mul_(2)
        assert not torch.isin(mode.of(y), tags).any()
        assert torch.equal(mode.of(x), tags)


@torch.inference_mode()
def test_large_tensors_and_forgotten_ones_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origins, "MAX_ELEMENTS", 10)
    mode = OriginsMode()
    with mode:
        small, large = torch.ones(10), torch.ones(11)
        assert torch.equal(mode.of(small.clone()), mode.of(small))
        assert not torch.isin(mode.of(large.clone()), mode.of(large)).any()
        before = mode.of(small).clone()
        mode.forget()
        assert not torch.isin(mode.of(small), before).any()
