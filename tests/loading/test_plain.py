"""Plain modules are filled by name: ties kept, buffers as the code has them, what does not fit named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from tests.models.plain_models import equal_state, make_gpt
from torch import Tensor, nn

from shardwright.errors import CheckpointError
from shardwright.loading.load import load_dummy_weights, load_weights
from shardwright.models.build import parameters_on_meta


class Tables(nn.Module):
    """Parameters and buffers of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("rope", torch.arange(4.0))
        self.register_buffer("mask", torch.ones(4, 4).tril(), persistent=False)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with parameters_on_meta():
        return make()


def save(tensors: dict[str, Tensor], directory: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def test_tied_parameter_under_one_of_its_names(tmp_path: Path) -> None:
    save_model(make_gpt(), str(tmp_path / "model.safetensors"))
    module = on_meta(make_gpt)
    load_weights(module, tmp_path, torch.float32)
    assert equal_state(module, make_gpt())
    assert module.head.weight is module.tokens.weight


def test_tied_parameter_under_both_names_must_be_one(tmp_path: Path) -> None:
    state = dict(make_gpt().state_dict())
    module = on_meta(make_gpt)
    load_weights(module, save(state, tmp_path), torch.float32)
    assert module.head.weight is module.tokens.weight
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"different values for tokens\.weight and head\.weight, which are one"):
        load_weights(on_meta(make_gpt), save(state, tmp_path), torch.float32)


def test_buffers_come_from_the_checkpoint_or_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = Tables().state_dict()
    state["rope"] = state["rope"] * 10
    del state["steps"]
    module = on_meta(Tables)
    load_weights(module, save(state | {"mask": torch.zeros(4, 4)}, tmp_path), torch.float32)
    assert module.get_buffer("rope").tolist() == [0, 10, 20, 30]
    assert module.get_buffer("steps") == 7
    assert module.get_buffer("mask").sum() == 10  # what code says is not for checkpoints is not taken from one
    assert "kept as the model's code computes them: steps" in caplog.text


@pytest.mark.parametrize("make", [lambda: on_meta(Tables), Tables])
def test_parameters_are_filled_wherever_they_were_made(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    source = Tables()
    module = make()
    load_weights(module, save(source.state_dict(), tmp_path), torch.float32)
    assert equal_state(module, source)


def test_types_are_those_of_the_module(tmp_path: Path) -> None:
    source = Tables()
    module = on_meta(Tables).bfloat16()
    load_weights(module, save(source.state_dict(), tmp_path), torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module.get_buffer("steps").dtype is torch.int64
    assert equal_state(module, source.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear.bias": None}, r"lacks 1 weights that Tables needs: linear\.bias; is it the checkpoint of another"),
        ({"head.bias": torch.ones(3)}, r"has 1 weights that Tables has no place for: head\.bias"),
        ({"linear.weight": torch.ones(4, 5)}, r"linear\.weight is 4x5, expected 4x4"),
        ({"scale": torch.ones(1)}, "scale is 1, expected a number"),
        (
            {"linear.weight": None, "lin.weight": torch.ones(4, 4)},
            r"not those of Tables: 1 are missing \(linear\.weight\), 1 have no place \(lin\.weight\).*--weight-map",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    state = {name: tensor for name, tensor in (Tables().state_dict() | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        load_weights(on_meta(Tables), save(state, tmp_path), torch.float32)


def test_random_weights_keep_ties_and_are_the_same_each_time() -> None:
    first, second = on_meta(make_gpt), on_meta(make_gpt)
    load_dummy_weights(first)
    load_dummy_weights(second)
    assert equal_state(first, second)
    assert first.head.weight is first.tokens.weight
    assert 0.01 < float(first.head.weight.detach().std()) < 0.03
    assert bool((first.norm.weight == 1).all())  # type: ignore[union-attr, operator]
