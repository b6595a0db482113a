"""Build the user's module without its weights: parameters on "meta", buffers real.

Parameters get their values from the checkpoint, so making them first would only cost time and memory. Buffers are
different: rotary frequencies, masks and position tables are computed by the constructor and are in no checkpoint.
Building everything on "meta", as is usual, forgets them, and code must say a second time how they are made. Here only
parameters, and the allocations that become parameters, go to "meta"; all other tensor code of the constructor runs as
its author wrote it.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as transformers_init
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shardwright.config import DType
from shardwright.errors import ModelSourceError, UnsupportedModelError
from shardwright.foreign_errors import described
from shardwright.loading.checkpoint import checkpoint_dtype

logger = logging.getLogger(__name__)


def load_config(path: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """Read a model directory's config.

    Raises: ModelSourceError if it cannot be read, is of no known type, or needs code that is not trusted.
    """
    try:
        raw = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as exc:
        raise ModelSourceError(f"cannot read {path / 'config.json'}: {exc}") from exc
    if not isinstance(raw, dict):
        raise ModelSourceError(f"{path / 'config.json'} holds no JSON object: it is no model config")
    model_type, auto_map = raw.get("model_type"), raw.get("auto_map") or {}
    files = ", ".join(sorted({f"{reference.split('.')[0]}.py" for reference in auto_map.values()}))
    if auto_map and not trust_remote_code and model_type not in CONFIG_MAPPING:
        raise ModelSourceError(
            f"{path} brings its own modeling code ({files}), which would run on this machine: "
            "read it, then pass --trust-remote-code (trust_remote_code=True) if you trust it"
        )
    if not auto_map and model_type not in CONFIG_MAPPING:
        raise ModelSourceError(
            f"{path / 'config.json'} has model_type {model_type!r}, which the installed Transformers does not know: "
            "upgrade transformers, or add the model's own code to the directory with an auto_map"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as exc:
        what = f"own code of {path} ({files})" if auto_map else f"config of {path}"
        raise ModelSourceError(f"the {what} cannot be loaded: {described(exc)}") from exc
    return config


def resolve_dtype(dtype: DType, config: PretrainedConfig, path: Path) -> torch.dtype:
    """The type to serve in: as asked, else the config's, else the checkpoint's, else float32."""
    if dtype != "auto":
        resolved = getattr(torch, dtype)
    else:
        resolved = config.dtype or config.get_text_config().dtype or checkpoint_dtype(path) or torch.float32
        if isinstance(resolved, str):
            resolved = getattr(torch, resolved)
    assert isinstance(resolved, torch.dtype)
    return resolved


def max_positions(config: PretrainedConfig) -> int | None:
    """Longest sequence that the model's config allows; None if it does not say."""
    text_config = config.get_text_config()
    names = (
        "max_position_embeddings", "n_positions", "max_target_positions", "max_sequence_length", "max_seq_len",
        "seq_length", "block_size",
    )  # fmt: skip
    found = (getattr(text_config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def build_module(config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool) -> PreTrainedModel:
    """The causal LM of a config in eval mode: parameters on "meta", buffers as the code computes them in float32.

    Raises: UnsupportedModelError if the code fails; ModelSourceError if there is no causal LM for the config.
    """
    if not (
        type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    ):
        raise ModelSourceError(
            f"model type {config.model_type!r} has no causal language model: "
            "it generates no text, but may embed some with --task embed"
        )
    return construct(
        AutoModelForCausalLM, config, dtype, trust_remote_code=trust_remote_code, attn_implementation="eager"
    )


def construct(
    auto_class: Any, config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool, **options: Any
) -> PreTrainedModel:
    """The module that one of Transformers' Auto classes has for a config, as `build_module` returns it.

    Args:
        auto_class: such as AutoModelForCausalLM.
        config: of the model; becomes the module's own.
        dtype: of parameters.
        trust_remote_code: whether code from the model's directory may run.
        options: for the module's constructor.

    Raises: UnsupportedModelError if the code fails.
    """
    options["trust_remote_code"] = trust_remote_code
    try:
        model = _construct(auto_class, config, dtype, options)
        if dtype is not torch.float32:
            _round_buffers(model, _construct(auto_class, copy.deepcopy(config), torch.float32, options))
    except Exception as exc:
        raise UnsupportedModelError(
            f"the code of {config.model_type!r} failed while it built the model: {described(exc)}"
        ) from exc
    model.eval()
    return model


def _construct(
    auto_class: Any, config: PretrainedConfig, dtype: torch.dtype, options: dict[str, Any]
) -> PreTrainedModel:
    with ExitStack() as stack:
        stack.enter_context(transformers_init.no_init_weights())
        stack.enter_context(transformers_init.no_tie_weights())
        stack.enter_context(parameters_on_meta())
        model = auto_class.from_config(config, dtype=dtype, **options)
    assert isinstance(model, PreTrainedModel)
    return model


def _round_buffers(model: PreTrainedModel, precise: PreTrainedModel) -> None:
    """Give buffers the values that the same code computes in float32.

    A constructor that runs in half precision rounds each step on the way to a table: rotary angles are then off by
    whole radians a few hundred positions in. Types stay as the half-precision constructor chose them.
    """
    values = dict(precise.named_buffers())
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.device.type != "meta":
            buffer.copy_(values[name])


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While open, every nn.Parameter lands on "meta", and uninitialised allocations are made there to begin with."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            moved = type(param)(param.to("meta"), requires_grad=param.requires_grad)
            moved.__dict__.update(param.__dict__)
            self._parameters[name] = moved

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty without a device gives a tensor on "meta": it is how layers allocate their weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
