"""A user's map renames, leaves out and joins weights, for every kind of module; what it gets wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.loading.checkpoints import Tensors, assert_same_state, copy_of, load
from tests.models.plain_models import equal_state, make_gpt

from shardwright.errors import CheckpointError, ConfigError
from shardwright.loading.load import load_weights
from shardwright.loading.weight_map import read_weight_map
from shardwright.models.build import parameters_on_meta


def state() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in make_gpt().state_dict().items()}


def load_gpt(path: Path, weight_map: Path | None = None) -> torch.nn.Module:
    with parameters_on_meta():
        module = make_gpt()
    load_weights(module, path, torch.float32, weight_map=weight_map)
    return module


def write_map(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        {"^transformer\\.h\\.(\\d+)\\.": "blocks.\\1.", "\\.ln_(\\d)": ".norm\\1"},
        [["^transformer\\.h\\.", "blocks."], ["ln_", "norm"]],
        [{"^transformer.h.": "blocks."}, {"ln_": "norm"}],
        {"rename": {"transformer": "encoder", "^encoder\\.h\\.": "blocks.", "ln_": "norm"}},
        {"rename": [["^transformer\\.h\\.", "blocks."], ["ln_", "norm"]]},
    ],
)
def test_names_are_replaced_in_order(tmp_path: Path, content: Any) -> None:
    renamed = {name.replace("blocks.", "transformer.h.").replace("norm1", "ln_1").replace("norm2", "ln_2"): tensor
               for name, tensor in state().items()}  # fmt: skip
    save_file(renamed, tmp_path / "model.safetensors")
    assert equal_state(load_gpt(tmp_path, write_map(tmp_path / "map.json", content)), make_gpt())


@pytest.mark.parametrize("name", ["rename.json", "rename.yaml", "rename.yml"])
def test_map_beside_the_weights_is_found(tmp_path: Path, name: str) -> None:
    torch.save({f"net.{key}": tensor for key, tensor in state().items()}, tmp_path / "model.pt")
    write_map(tmp_path / name, '{"^net\\\\.": ""}' if name == "rename.json" else '"^net[.]": ""')
    assert equal_state(load_gpt(tmp_path), make_gpt())
    assert equal_state(load_gpt(tmp_path / "model.pt"), make_gpt())


def test_null_leaves_weights_out(tmp_path: Path) -> None:
    torch.save(
        state() | {"loss.weight": torch.ones(1), "blocks.0.attention.bias_mask": torch.ones(1)}, tmp_path / "m.pt"
    )
    content = {"^loss\\.": None, "bias_mask$": None}
    assert equal_state(load_gpt(tmp_path, write_map(tmp_path / "map.json", content)), make_gpt())


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_pieces_are_joined_in_every_layer(tmp_path: Path, kind: str) -> None:
    tensors = state()
    for i in range(2):
        for leaf in ("weight", "bias"):
            pieces = tensors.pop(f"blocks.{i}.attention.qkv.{leaf}").chunk(3)
            names = [f"blocks.{i}.attention.{letter}.{leaf}" for letter in "qkv"]
            tensors |= {name: piece.clone() for name, piece in zip(names, pieces, strict=True)}
    left, right = tensors.pop("blocks.0.mlp.0.weight").chunk(2, dim=1)
    tensors |= {"blocks.0.mlp.left": left.contiguous(), "blocks.0.mlp.right": right.contiguous()}
    if kind == "pt":
        torch.save(tensors, tmp_path / "model.pt")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    merge = {
        "qkv.weight": ["q.weight", "k.weight", "v.weight"],
        "qkv.bias": ["q.bias", "k.bias", "v.bias"],
        "0.weight": {"from": ["left", "right"], "dim": 1},
    }
    assert equal_state(load_gpt(tmp_path, write_map(tmp_path / "map.json", {"merge": merge})), make_gpt())


def test_map_works_for_transformers_models(tiny_llama: Path, tmp_path: Path) -> None:
    def scramble(tensors: Tensors) -> None:
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name.endswith("o_proj.weight"):
                top, bottom = tensor.chunk(2)
                tensors |= {f"net.{name}.top": top.clone(), f"net.{name}.bottom": bottom.clone()}
            else:
                tensors[f"net.{name}"] = tensor

    directory = copy_of(tiny_llama, tmp_path / "model", scramble)
    merge = {"o_proj.weight": ["o_proj.weight.top", "o_proj.weight.bottom"]}
    write_map(directory / "rename.json", {"rename": {"^net\\.": ""}, "merge": merge})
    assert_same_state(load(directory), load(tiny_llama))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot read the weight map .*map\.json"),
        ("3", "is no weight map"),
        ({}, "is no weight map"),
        ({"renam": {"a": "b"}}, "unknown key 'renam': there are rename and merge"),
        ({"rename": 3}, "rename is a int but must map a regex"),
        ({"merge": ["a"]}, "merge is a list but must map"),
        ({"(": "b"}, r"'\(' is no regex: "),
        ([["a"]], r"\['a'\] is no renaming"),
        ([["a", 3]], r"is no renaming"),
        (["ab"], "'ab' is no renaming"),
        ({"merge": {"a": "b"}}, "'a' is merged from 'b': write a list of names"),
        ({"merge": {"a": ["b"]}}, "is merged from"),
        ({"merge": {"a": {"from": ["b", "c"], "axis": 1}}}, "is merged from"),
        ({"tokens": "\\2"}, r"the replacement '\\\\2' of 'tokens': invalid group reference"),
    ],
)
def test_map_that_makes_no_sense_is_a_config_error(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(state(), tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=message):
        load_gpt(tmp_path, write_map(tmp_path / "map.json", content))


def test_map_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the weight map .*nowhere\.json.*No such file"):
        read_weight_map(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"^decoder\\.": ""}, r"no weight matches '\^decoder\\\\\.'; the checkpoint has tokens\.weight, .* and more"),
        ({"norm1": "norm2"}, r"gives both blocks\.0\.norm1\.\w+ and blocks\.0\.norm2\.\w+ the name blocks\.0\.norm2"),
        ({"merge": {"x": ["no.such", "name"]}}, r"no weight is named no\.such or ends in \.no\.such"),
        (
            {"merge": {"x": ["norm1.weight", "norm3.weight"]}},
            r"joined of blocks\.0\.norm3\.weight too, which the checkpoint l",
        ),
        (
            {"merge": {"head.weight": ["tokens.weight", "positions.weight"]}},
            r"head\.weight is to be joined, but .* already",
        ),
        ({"merge": {"x": ["norm1.weight", "qkv.weight"]}}, "x is to be joined of blocks.0.qkv.weight"),
        (
            {"merge": {"x": ["norm1.weight", "mlp.0.weight"]}},
            r"blocks\.0\.x cannot be joined of \(64,\), \(128, 64\)|no place",
        ),
    ],
)
def test_map_that_does_not_fit_the_checkpoint_is_named(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(state(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load_gpt(tmp_path, write_map(tmp_path / "map.json", content))


def test_shapes_that_cannot_be_joined_are_shown(tmp_path: Path) -> None:
    tensors = load_state_with_odd_pieces()
    torch.save(tensors, tmp_path / "model.pt")
    content = {"merge": {"head.weight": ["one", "two"]}}
    with pytest.raises(CheckpointError, match=r"head\.weight cannot be joined of \(2, 3\), \(4, 5\) along dimension 0"):
        load_gpt(tmp_path, write_map(tmp_path / "map.json", content))


def load_state_with_odd_pieces() -> dict[str, torch.Tensor]:
    tensors = state()
    del tensors["head.weight"], tensors["tokens.weight"]
    return tensors | {"one": torch.ones(2, 3), "two": torch.ones(4, 5)}


def test_file_that_was_written_is_read_back(tmp_path: Path) -> None:
    """What is saved from a module needs no map."""
    save_file(state(), tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == state().keys()
    assert equal_state(load_gpt(tmp_path), make_gpt())
