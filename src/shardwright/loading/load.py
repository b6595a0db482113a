"""Fill a module from its checkpoint, or with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from shardwright.config import LoadFormat
from shardwright.loading.checkpoint import open_checkpoint
from shardwright.loading.plain import fill_plain, find_places, put
from shardwright.loading.pretrained import fill_pretrained
from shardwright.loading.wrappers import unwrap_names

if TYPE_CHECKING:
    from shardwright.plans.slices import ShardSlice


def load_weights(
    model: nn.Module,
    path: Path,
    dtype: torch.dtype,
    *,
    is_part: bool = False,
    load_format: LoadFormat = "auto",
    weight_map: str | Path | None = None,
    part: ShardSlice | None = None,
) -> None:
    """Load a checkpoint into a module.

    Args:
        model: a Transformers model whose parameters are on "meta" (models.build.build_module), or any module, cast to
            `dtype`; changed in place.
        path: a directory, or one file of weights.
        dtype: of floating-point weights, but for those that a Transformers model keeps in float32.
        is_part: the checkpoint holds more than this model: the text part of a model with vision is served alone.
        load_format: which files to look for in a directory.
        weight_map: file with the user's own renamings.
        part: what this rank holds of `model`, which is cut for it (`plans.shard.shard`): nothing else is read.

    Raises: CheckpointError naming weights that are missing, unexpected, of the wrong shape or unreadable.
    """
    with open_checkpoint(path, load_format=load_format, weight_map=weight_map) as tensors:
        tensors = unwrap_names(tensors, model.state_dict().keys(), where=path)
        if isinstance(model, PreTrainedModel):
            fill_pretrained(model, tensors, path, dtype, is_part=is_part, part=part)
        else:
            fill_plain(model, tensors, path, part=part)


@torch.no_grad()
def load_dummy_weights(model: nn.Module, *, seed: int = 0, part: ShardSlice | None = None) -> None:
    """Random weights of a plausible scale, to try a configuration without its checkpoint.

    Args:
        model: changed in place where it is on "meta".
        seed: of the weights.
        part: what this rank holds of `model`, which is cut for it: it gets its part of the weights of the whole.
    """
    generator = torch.Generator().manual_seed(seed)
    for place in find_places(model):
        name = place.names[0]
        shape = None if part is None else part.whole_shape(name)
        is_elsewhere = part is not None and not part.holds(name)
        if not place.tensor.is_meta and not is_elsewhere:
            continue
        value = torch.zeros(place.tensor.shape if shape is None else shape, dtype=place.tensor.dtype)
        owner, _, leaf = name.rpartition(".")
        if value.ndim >= 2 and value.is_floating_point():
            value.normal_(0.0, 0.02, generator=generator)
        elif "norm" in type(model.get_submodule(owner)).__name__.lower() and leaf == "weight":
            value.fill_(1.0)
        if not is_elsewhere:
            put(model, place, value if part is None else part.take(name, value).contiguous())
    if isinstance(model, PreTrainedModel):
        model.tie_weights(recompute_mapping=False)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once, and of what stands for quantized ones."""
    quantized = sum(getattr(module, "quantized_bytes", 0) for module in model.modules())
    return quantized + sum(p.numel() * p.element_size() for p in model.parameters())
