"""Fill a module's parameters from its checkpoint.

Transformers knows how published checkpoints map onto its modules (renamed keys, experts merged into one tensor, fused
projections split), and its loader is used for that. Around it stand what serving needs: nothing missing, nothing left
over, nothing of the wrong shape in silence.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from shardwright.errors import CheckpointError
from shardwright.loading.checkpoint import open_checkpoint

logger = logging.getLogger(__name__)

NAMES_SHOWN = 6


def load_weights(model: PreTrainedModel, path: Path, dtype: torch.dtype, *, is_part: bool = False) -> None:
    """Load the checkpoint of a directory into a module whose parameters are on "meta".

    Args:
        model: from models.build.build_module; changed in place.
        path: model directory.
        dtype: of floating-point weights, but for those that the model keeps in float32.
        is_part: the checkpoint holds more than this model: the text part of a model with vision is served alone.

    Raises: CheckpointError naming weights that are missing, unexpected, of the wrong shape or unreadable.
    """
    mapping: list[Any] = get_model_conversion_mapping(model)
    options = LoadStateDictConfig(
        pretrained_model_name_or_path=str(path),
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,
    )
    with open_checkpoint(path) as slices:
        info, _ = convert_and_load_state_dict_in_model(model=model, state_dict=dict(slices), load_config=options)
    if info.conversion_errors:
        name, error = next(iter(info.conversion_errors.items()))
        raise CheckpointError(f"weights of {path} cannot be converted, first {name}: {error.strip().splitlines()[-1]}")
    if info.mismatched_keys:
        rows = [f"{name} is {_shape(found)}, expected {_shape(wanted)}" for name, found, wanted in info.mismatched_keys]
        raise CheckpointError(f"weights of {path} do not fit the config: {_some(rows)}")
    model.mark_tied_weights_as_initialized(info)
    _make_missing(model, path, info.missing_keys)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    if is_part and info.unexpected_keys:
        logger.info("%s: %d weights of other parts of the model left out", path, len(info.unexpected_keys))
        info.unexpected_keys.clear()
    _check_complete(model, path, info.missing_keys, info.unexpected_keys)


def load_dummy_weights(model: PreTrainedModel, *, seed: int = 0) -> None:
    """Random weights of a plausible scale, to try a configuration without its checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                continue
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            if parameter.ndim < 2:
                value.fill_(1.0 if "norm" in type(module).__name__.lower() and name == "weight" else 0.0)
            else:
                value.normal_(0.0, 0.02, generator=generator)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.tie_weights(recompute_mapping=False)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _make_missing(model: PreTrainedModel, path: Path, missing: set[str]) -> None:
    """Give what no checkpoint holds the values its code computes: buffers kept from the constructor, the rest by its
    own init.

    A parameter that stays missing is an error later on, unless the model says that it may be.
    """
    tied = set(model.all_tied_weights_keys)
    unmade = {name: p for name, p in model.named_parameters() if p.device.type == "meta" and name in missing - tied}
    unmade_buffers: dict[str, Tensor] = {name: b for name, b in model.named_buffers() if b.device.type == "meta"}
    if kept := sorted(name for name, _ in model.named_buffers() if name in missing and name not in unmade_buffers):
        logger.warning("%s: not in the checkpoint, kept as the model's code computes them: %s", path, _some(kept))
        missing.difference_update(kept)
    if not unmade and not unmade_buffers:
        return
    for name, tensor in (unmade | unmade_buffers).items():
        owner, _, leaf = name.rpartition(".")
        made = torch.empty_like(tensor, device="cpu")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(made, False) if name in unmade else made)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta" and not any(tensor is made for made in _named(model, unmade | unmade_buffers)):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()


def _named(model: nn.Module, names: dict[str, Tensor]) -> list[Tensor]:
    return [getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]


def _check_complete(model: PreTrainedModel, path: Path, missing: set[str], unexpected: set[str]) -> None:
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} weights that {type(model).__name__} needs: {_some(sorted(missing))}; "
            "is it the checkpoint of another model, or only a part of one?"
        )
    if unexpected:
        raise CheckpointError(
            f"{path} has {len(unexpected)} weights that {type(model).__name__} has no place for: "
            f"{_some(sorted(unexpected))}; does the config belong to another model?"
        )
    if left := [name for name, p in model.named_parameters() if p.device.type == "meta"]:
        raise CheckpointError(f"{path}: nothing was loaded into {_some(left)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape))
