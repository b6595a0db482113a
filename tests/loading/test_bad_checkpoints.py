"""What is wrong with a checkpoint is said before anything runs, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.loading.checkpoints import Tensors, copy_of, load, shard

from shardwright.errors import CheckpointError


def drop_one(tensors: Tensors) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def add_one(tensors: Tensors) -> None:
    tensors["model.layers.7.extra.weight"] = torch.zeros(3)


def narrow_one(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(90, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, r"lacks 1 weights that LlamaForCausalLM needs: model\.layers\.1\.self_attn\.k_proj\.weight"),
        (add_one, r"1 weights that LlamaForCausalLM has no place for: model\.layers\.7\.extra\.weight"),
        (narrow_one, r"model\.layers\.0\.mlp\.up_proj\.weight is 90x64, expected 96x64"),
    ],
)
def test_weights_that_do_not_fit_are_named(tiny_llama: Path, tmp_path: Path, change: object, message: str) -> None:
    directory = copy_of(tiny_llama, tmp_path / "model", change)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_an_untied_head_that_is_missing_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    def drop_head(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]

    with pytest.raises(CheckpointError, match=r"needs: lm_head\.weight"):
        load(copy_of(tiny_llama, tmp_path / "model", drop_head))


def test_extra_weights_are_left_out_of_a_part_only(tiny_llama: Path, tmp_path: Path) -> None:
    load(copy_of(tiny_llama, tmp_path / "model", add_one), is_part=True)
    with pytest.raises(CheckpointError, match="k_proj"):
        load(copy_of(tiny_llama, tmp_path / "part", drop_one), is_part=True)


def test_many_names_are_cut_short(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks 9 weights .* and 3 more; is it"):
        load(copy_of(tiny_llama, tmp_path / "model", num_hidden_layers=3))


@pytest.mark.parametrize("kept_bytes", [0, 5, 3000, -1])
def test_truncated_file_is_named(tiny_llama: Path, tmp_path: Path, kept_bytes: int) -> None:
    directory = copy_of(tiny_llama, tmp_path / "model")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        load(directory)


def test_missing_shard_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_llama, tmp_path / "model")
    shard(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 3 weight files.*: model-00002-of-00003\.safetensors"):
        load(directory)


def test_truncated_shard_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_llama, tmp_path / "model")
    shard(directory)
    file = directory / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors is damaged or truncated"):
        load(directory)


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1, "b": "c"}}'])
def test_broken_index_is_named(tiny_llama: Path, tmp_path: Path, index: str) -> None:
    directory = copy_of(tiny_llama, tmp_path / "model")
    shard(directory)
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(directory)


def test_index_that_is_not_text_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_llama, tmp_path / "model")
    (directory / "model.safetensors.index.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"index .*model\.safetensors\.index\.json cannot be read"):
        load(directory)


def test_config_without_weights_says_what_is_expected(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_llama, tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "model.gguf")
    with pytest.raises(CheckpointError, match=r"no weights that can be read here \(it has model\.gguf\).*dummy"):
        load(directory)
