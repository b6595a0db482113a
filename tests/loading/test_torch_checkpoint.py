"""Checkpoints of torch.save: state dicts alone or nested, single or sharded, for every kind of module; no code in them
runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.loading.checkpoints import assert_same_state, copy_of, load
from tests.models.plain_models import equal_state, make_gpt

from shardwright.errors import CheckpointError
from shardwright.loading.checkpoint import checkpoint_dtype, checkpoint_files, has_checkpoint
from shardwright.loading.load import load_weights
from shardwright.models.build import parameters_on_meta


def load_gpt(path: Path, **options: Any) -> torch.nn.Module:
    with parameters_on_meta():
        module = make_gpt()
    load_weights(module, path, torch.float32, **options)
    return module


def with_bin(source: Path, target: Path) -> Path:
    """A Transformers directory whose weights are a pytorch_model.bin."""
    directory = copy_of(source, target)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "ckpt.pth", "anything.bin"])
@pytest.mark.parametrize("new_format", [True, False])
def test_any_name_and_format(tmp_path: Path, name: str, new_format: bool) -> None:
    torch.save(make_gpt().state_dict(), tmp_path / name, _use_new_zipfile_serialization=new_format)
    assert equal_state(load_gpt(tmp_path), make_gpt())
    assert equal_state(load_gpt(tmp_path / name), make_gpt())


def test_transformers_models_are_read_too(tiny_llama: Path, tmp_path: Path) -> None:
    assert_same_state(load(with_bin(tiny_llama, tmp_path / "bin")), load(tiny_llama))


def test_shards_with_an_index(tiny_llama: Path, tmp_path: Path) -> None:
    directory = with_bin(tiny_llama, tmp_path / "bin")
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    (directory / "pytorch_model.bin").unlink()
    files = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if files[name] == file}, directory / file)
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert_same_state(load(directory), load(tiny_llama))
    index.unlink()
    assert_same_state(load(directory), load(tiny_llama))


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {
            "model": state,
            "optimizer": {"state": {0: torch.ones(1)}},
            "iter_num": 7,
            "loss": torch.ones(()),
        },
        lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "epoch": 1},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"module._orig_mod.model.{name}": tensor for name, tensor in state.items()},
        lambda state: {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in state.items()},
        lambda state: {"model": {"module": state}},
    ],
)
def test_what_training_adds_around_weights_is_taken_off(
    tmp_path: Path, nest: Callable[[dict[str, Any]], dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(nest(make_gpt().state_dict()), tmp_path / "ckpt.pt")
    with caplog.at_level(logging.INFO, "shardwright"):
        assert equal_state(load_gpt(tmp_path), make_gpt())
    assert "weights" in caplog.text


def test_a_module_that_has_the_prefix_itself_keeps_it(tmp_path: Path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_gpt()

    torch.save(Wrapper().state_dict(), tmp_path / "model.pt")
    with parameters_on_meta():
        module = Wrapper()
    load_weights(module, tmp_path, torch.float32)
    assert equal_state(module, Wrapper())


def test_safetensors_come_first_unless_told_otherwise(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_llama, tmp_path / "both")
    torch.save({}, directory / "pytorch_model.bin")
    assert [file.name for file in checkpoint_files(directory)] == ["model.safetensors"]
    assert [file.name for file in checkpoint_files(directory, "pt")] == ["pytorch_model.bin"]
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights that can be read here \(it has pytorch_model.bin\)"):
        checkpoint_files(directory, "safetensors")


def test_type_of_the_checkpoint_is_found(tmp_path: Path) -> None:
    torch.save({"model": make_gpt().bfloat16().state_dict()}, tmp_path / "model.pt")
    assert checkpoint_dtype(tmp_path) is torch.bfloat16


def test_what_trainers_leave_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (tmp_path / name).touch()
    assert not has_checkpoint(tmp_path)
    torch.save(make_gpt().state_dict(), tmp_path / "model.pt")
    assert has_checkpoint(tmp_path)
    assert not has_checkpoint(tmp_path, "safetensors")
    assert equal_state(load_gpt(tmp_path), make_gpt())


def test_of_several_checkpoints_one_must_be_named(tmp_path: Path) -> None:
    for step in (100, 200):
        torch.save(make_gpt().state_dict(), tmp_path / f"step_{step}.pt")
    with pytest.raises(
        CheckpointError, match=r"several checkpoints \(step_100.pt, step_200.pt\).*--weights .*step_200.pt"
    ):
        load_gpt(tmp_path)
    assert equal_state(load_gpt(tmp_path / "step_100.pt"), make_gpt())


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    torch.save(make_gpt(), tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=r"model\.pt holds an object of .*HandmadeGPT, and reading it would run code"
    ):
        load_gpt(tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 3, 500, -100])
@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_file_is_named(tmp_path: Path, kept_bytes: int, new_format: bool) -> None:
    file = tmp_path / "model.pt"
    torch.save(make_gpt().state_dict(), file, _use_new_zipfile_serialization=new_format)
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(
        CheckpointError, match=r"model\.pt is damaged, truncated or no checkpoint of torch.save \([\d,]+ b"
    ):
        load_gpt(tmp_path)


@pytest.mark.parametrize(
    ("content", "held"),
    [({"step": 3, "note": "hi"}, "step, note"), ({}, "nothing"), ([1, 2], "list"), (torch.ones(2), "Tensor")],
)
def test_file_without_a_state_dict_says_what_it_holds(tmp_path: Path, content: object, held: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=f"has no state dict: it holds {held}"):
        load_gpt(tmp_path)
