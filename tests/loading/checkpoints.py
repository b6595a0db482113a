"""Checkpoints to load: copies of a good one with something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from shardwright.loading.load import load_weights
from shardwright.models.build import build_module, load_config

Tensors = dict[str, Tensor]


def copy_of(source: Path, target: Path, change: Callable[[Tensors], None] | None = None, **config: object) -> Path:
    """A model directory with tensors and config fields changed."""
    shutil.copytree(source, target)
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def shard(directory: Path, num_shards: int = 3) -> dict[str, str]:
    """Cut the directory's checkpoint into files with an index. Returns the index: tensor to file."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {name: f"model-{1 + i % num_shards:05}-of-{num_shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        own = {name: tensors[name] for name, place in files.items() if place == file}
        save_file(own, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def load(path: Path, dtype: torch.dtype = torch.float32, *, is_part: bool = False) -> PreTrainedModel:
    """Build and load, as the engine does."""
    model = build_module(load_config(path, trust_remote_code=True), dtype, trust_remote_code=True)
    load_weights(model, path, dtype, is_part=is_part)
    return model


def assert_same_state(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Every parameter and buffer equal to the last bit, of the same type, and on the CPU."""
    ours = dict(actual.named_parameters(remove_duplicate=False)) | dict(actual.named_buffers(remove_duplicate=False))
    theirs = dict(expected.named_parameters(remove_duplicate=False))
    theirs |= dict(expected.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
