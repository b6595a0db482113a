"""A model as its files describe it: found, its config read, types and lengths resolved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from shardwright.adapt.describe import count_layers, describe
from shardwright.adapt.eager import eager
from shardwright.adapt.served_model import ServedModel
from shardwright.config import ModelConfig
from shardwright.errors import CheckpointError, ConfigError, UnsupportedModelError
from shardwright.experts.loops import ExpertLoop, ExpertLoops
from shardwright.loading.checkpoint import checkpoint_path
from shardwright.loading.load import load_dummy_weights, load_weights
from shardwright.models.build import build_module, load_config, max_positions, resolve_dtype
from shardwright.models.custom import CustomModel, cast_floats, find_custom
from shardwright.models.resolve import home_directory, resolve_model
from shardwright.worker.ladder import climb
from shardwright.worker.no_padding import expect_no_padding
from shardwright.worker.step import StepModel

if TYPE_CHECKING:
    from shardwright.plans.slices import ShardSlice

DEFAULT_MODEL_LEN = 4096
"""Longest sequence for models whose config names no limit."""

MOST_CHECKED_PARAMETERS = 500_000_000
"""A larger model that is only looked at is not run against its own attention, as it is when it is served."""

BLOCK_SIZE = 16
"""Of the check of a model that is only looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """All that it takes to build a model."""

    path: Path | None
    """The model's directory; None for code that has none."""
    config: PretrainedConfig
    dtype: torch.dtype
    max_model_len: int
    vocab_size: int
    options: ModelConfig
    custom: CustomModel | None = None
    """Of a module that a factory makes."""

    @classmethod
    def of(cls, model: ModelConfig) -> Blueprint:
        """Find the model that the options name.

        Raises: ModelSourceError or ConfigError; UnsupportedModelError if a factory fails.
        """
        custom = find_custom(model)
        if custom is not None:
            made = custom.look(dummy=model.load_format == "dummy")
            path, dtype = home_directory(model), custom.dtype(made.module)
            try:
                config = describe(made.module, **custom.facts(made))
            except UnsupportedModelError as exc:
                raise UnsupportedModelError(f"{custom.factory.label}: {exc}") from exc
        else:
            path = resolve_model(model.model, revision=model.revision)
            config = load_config(path, trust_remote_code=model.trust_remote_code)
            dtype = resolve_dtype(model.dtype, config, checkpoint_path(model.weights or path))
        return cls(
            path=path,
            config=config,
            dtype=dtype,
            max_model_len=resolve_max_model_len(model.max_model_len, config),
            vocab_size=int(config.get_text_config().vocab_size),
            options=model,
            custom=custom,
        )

    def num_layers(self, module: nn.Module) -> int | None:
        """What the config says, or can be told from the module."""
        return getattr(self.config.get_text_config(), "num_hidden_layers", None) or count_layers(module)

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The module, on "meta" if its weights are yet to be loaded. Raises UnsupportedModelError if its code fails."""
        if self.custom is not None:
            return cast_floats(self.custom.make().module, dtype)
        module = build_module(self.config, dtype, trust_remote_code=self.options.trust_remote_code)
        module.tie_weights(recompute_mapping=False)
        return module

    def load(self, *, dummy: bool = False, cut: Callable[[nn.Module], ShardSlice] | None = None) -> nn.Module:
        """The module with its weights, or with random ones, for inference on the CPU.

        Args:
            dummy: random weights.
            cut: is given the whole module, on "meta" unless a factory fills it, makes it this rank's part of it, in
                place, and says what that is; only this part is loaded.

        Raises: UnsupportedModelError if its code fails; CheckpointError if the weights do not fit; what `cut` raises.
        """
        if self.custom is not None:
            return self.custom.load(self.dtype, dummy=dummy, cut=cut)
        assert self.path is not None
        module = build_module(self.config, self.dtype, trust_remote_code=self.options.trust_remote_code)
        part = None
        if cut is not None:
            module.tie_weights(recompute_mapping=False)  # what is one tensor is cut once
            part = cut(module)
        if dummy:
            load_dummy_weights(module, part=part)
        else:
            load_weights(
                module,
                checkpoint_path(self.options.weights or self.path),
                self.dtype,
                is_part=type(module.config) is not type(self.config),
                load_format=self.options.load_format,
                weight_map=self.options.weight_map,
                part=part,
            )
        return module.requires_grad_(False)

    @eager
    def capture(self, *, num_parameters: int) -> tuple[StepModel | ServedModel, list[ExpertLoop]]:
        """Capture the model's attention and its experts as serving it would, to look at them.

        A model of moderate size is checked against its own forward pass too, with its weights, or random ones if they
        cannot be read. A large one stays on "meta", or gets zeros if its code looks at values, as some routers do; its
        experts are not looked at.

        Raises: UnsupportedModelError, with the reason.
        """
        if not self.is_large(num_parameters):
            module = self._load_in_float32()
            expect_no_padding(module)
            loops = ExpertLoops(module)
            model = climb(
                module,
                num_positions=self.max_model_len,
                vocab_size=self.vocab_size,
                block_size=BLOCK_SIZE,
                dtype=torch.float32,
                compute_dtype=torch.float32,
                device=torch.device("cpu"),
                self_check=self.options.self_check,
                loops=loops,
            )
            return model, loops.found
        problems = []
        for place in (nn.Module.eval, _without_buffers, fill_with_zeros):
            module = place(self.build(self.dtype))
            for own_rows in (None, self.dtype):
                try:
                    return ServedModel(module, num_positions=self.max_model_len, own_rows=own_rows), []
                except UnsupportedModelError as exc:
                    problems.append(exc)
        raise problems[0]

    def is_large(self, num_parameters: int) -> bool:
        """Whether the model is looked at only for the first rung of the ladder, and not run against its own logits.

        Never one that a factory makes: it does not stand on that rung.
        """
        return num_parameters > MOST_CHECKED_PARAMETERS and self.custom is None

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end an output, of a model that has no files to say so."""
        token_ids = self.config.eos_token_id if self.custom is not None else None
        return [token_ids] if isinstance(token_ids, int) else list(token_ids or [])

    def _load_in_float32(self) -> nn.Module:
        blueprint = replace(self, dtype=torch.float32)
        try:
            return blueprint.load()
        except CheckpointError:
            return blueprint.load(dummy=True)


def resolve_max_model_len(asked: int | None, config: PretrainedConfig) -> int:
    """Most tokens of a sequence. Raises ConfigError if more is asked for than the model has positions."""
    limit = max_positions(config)
    if asked is None:
        return limit or DEFAULT_MODEL_LEN
    if limit is not None and asked > limit:
        raise ConfigError(f"max_model_len is {asked:,} but the model has {limit:,} positions: lower it")
    return asked


def _without_buffers(module: nn.Module) -> nn.Module:
    """Put buffers on "meta" too: code may add them to what parameters make."""
    return module.to("meta")


def fill_with_zeros(module: nn.Module) -> nn.Module:
    """Give parameters on "meta" values of zero, in memory that the system provides when it is written: it never is."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                memory = torch.from_numpy(np.zeros(parameter.nbytes, dtype=np.uint8))
                zeros = memory.view(parameter.dtype).view(parameter.shape)
                setattr(owner, name, torch.nn.Parameter(zeros, requires_grad=False))
    return module
