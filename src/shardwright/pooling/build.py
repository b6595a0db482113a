"""The module that reads texts, and its weights: the body of a model without its head, or a classifier."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
)

from shardwright.config import ModelConfig
from shardwright.errors import ModelSourceError
from shardwright.loading.load import load_dummy_weights, load_weights
from shardwright.models.build import construct


def build_reader(
    options: ModelConfig, config: PretrainedConfig, dtype: torch.dtype, *, classifies: bool
) -> PreTrainedModel:
    """The module in eval mode, its parameters on "meta".

    Args:
        options: of the user.
        config: of the model; becomes the module's own.
        dtype: of parameters.
        classifies: whether a classifier is wanted rather than hidden states.

    Raises: ModelSourceError if there is no such module for the config; UnsupportedModelError if its code fails.
    """
    auto_class: Any = AutoModel
    if classifies:
        auto_class = AutoModelForSequenceClassification
    elif config.is_encoder_decoder or type(config) in AutoModelForTextEncoding._model_mapping:
        auto_class = AutoModelForTextEncoding  # of an encoder and a decoder, the encoder alone
    if not (type(config) in auto_class._model_mapping or auto_class.__name__ in getattr(config, "auto_map", {})):
        what = "classifier of texts" if classifies else "encoder of texts"
        raise ModelSourceError(
            f"model type {config.model_type!r} has no {what} in the installed Transformers, nor in code of its own"
        )
    config.use_cache = False
    module = construct(auto_class, config, dtype, trust_remote_code=options.trust_remote_code)
    may_lack_pooler = "add_pooling_layer" in inspect.signature(type(module).__init__).parameters
    if not classifies and may_lack_pooler and "pooler" in dict(module.named_children()):
        module.register_module("pooler", None)  # a head for pre-training, which many checkpoints lack
    return module.requires_grad_(False)


def fill_reader(
    module: PreTrainedModel, options: ModelConfig, weights: Path, dtype: torch.dtype, *, is_part: bool
) -> None:
    """Load a module's weights, or make random ones if the user asked for that.

    Args:
        module: from `build_reader`.
        options: of the user.
        weights: folder or file of the checkpoint.
        dtype: of the weights.
        is_part: the checkpoint may hold more, such as a head that is not used.

    Raises: CheckpointError.
    """
    if options.load_format == "dummy":
        load_dummy_weights(module)
    else:
        load_weights(
            module,
            weights,
            dtype,
            is_part=is_part,
            load_format=options.load_format,
            weight_map=options.weight_map,
        )
