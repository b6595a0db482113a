"""Fill a Transformers model from its checkpoint.

Transformers knows how published checkpoints map onto its modules (renamed keys, experts merged into one tensor, fused
projections split), and its loader is used for that. Around it stand what serving needs: nothing missing, nothing left
over, nothing of the wrong shape in silence.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from shardwright.errors import CheckpointError
from shardwright.loading.complete import check_filled, check_names, check_shapes, some
from shardwright.loading.lazy import lazy
from shardwright.loading.part import PartTarget

if TYPE_CHECKING:
    from shardwright.plans.slices import ShardSlice

logger = logging.getLogger(__name__)


def fill_pretrained(
    model: PreTrainedModel,
    tensors: dict[str, Any],
    path: Path,
    dtype: torch.dtype,
    *,
    is_part: bool,
    part: ShardSlice | None = None,
) -> None:
    """Load tensors into a model whose parameters are on "meta".

    Args:
        model: changed in place; cut, if `part` is given.
        tensors: of the checkpoint, by name.
        path: of the checkpoint, for what is said of it.
        dtype: of floating-point weights, but for those that the model keeps in float32.
        is_part: the checkpoint holds more than this model.
        part: what this rank holds of it, the only thing that is read.

    Raises: CheckpointError naming weights that are missing, unexpected or of the wrong shape.
    """
    target: Any = model
    if part is not None:
        target, tensors = PartTarget(model, part), {name: lazy(stored) for name, stored in tensors.items()}
    mapping: list[Any] = get_model_conversion_mapping(model)
    options = LoadStateDictConfig(
        pretrained_model_name_or_path=str(path),
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,
    )
    info, _ = convert_and_load_state_dict_in_model(model=target, state_dict=tensors, load_config=options)
    if info.conversion_errors:
        name, error = next(iter(info.conversion_errors.items()))
        raise CheckpointError(f"weights of {path} cannot be converted, first {name}: {error.strip().splitlines()[-1]}")
    check_shapes(path, info.mismatched_keys)
    model.mark_tied_weights_as_initialized(info)
    _make_missing(model, path, info.missing_keys)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    if is_part and info.unexpected_keys:
        logger.info("%s: %d weights of other parts of the model left out", path, len(info.unexpected_keys))
        info.unexpected_keys.clear()
    check_names(model, path, info.missing_keys, info.unexpected_keys)
    check_filled(model, path)


def _make_missing(model: PreTrainedModel, path: Path, missing: set[str]) -> None:
    """Give what no checkpoint holds the values its code computes: buffers kept from the constructor, the rest by its
    own init.

    A parameter that stays missing is an error later on, unless the model says that it may be.
    """
    tied = set(model.all_tied_weights_keys)
    unmade = {name: p for name, p in model.named_parameters() if p.device.type == "meta" and name in missing - tied}
    unmade_buffers: dict[str, Tensor] = {name: b for name, b in model.named_buffers() if b.device.type == "meta"}
    if kept := sorted(name for name, _ in model.named_buffers() if name in missing and name not in unmade_buffers):
        logger.warning("%s: not in the checkpoint, kept as the model's code computes them: %s", path, some(kept))
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
