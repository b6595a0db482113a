"""A model that is looked at, not served: built, and run as far as it takes to know its attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from shardwright.adapt.served_model import ServedModel
from shardwright.config import ModelConfig
from shardwright.errors import CheckpointError, UnsupportedModelError
from shardwright.loading.load import load_dummy_weights, load_weights
from shardwright.models.build import build_module, load_config, resolve_dtype
from shardwright.models.resolve import resolve_model
from shardwright.worker.ladder import climb
from shardwright.worker.step import StepModel
from shardwright.worker.worker import resolve_max_model_len

MOST_CHECKED_PARAMETERS = 500_000_000
"""A larger model is not run against its own attention here, as it is when it is served: that would take long."""

BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """All that it takes to build a model."""

    path: Path
    config: PretrainedConfig
    dtype: torch.dtype
    max_model_len: int
    trust_remote_code: bool

    @classmethod
    def of(cls, model: ModelConfig) -> Blueprint:
        """Find the model that the options name. Raises ModelSourceError or ConfigError."""
        path = resolve_model(model.model, revision=model.revision)
        config = load_config(path, trust_remote_code=model.trust_remote_code)
        return cls(
            path=path,
            config=config,
            dtype=resolve_dtype(model.dtype, config, path),
            max_model_len=resolve_max_model_len(model.max_model_len, config),
            trust_remote_code=model.trust_remote_code,
        )

    def build(self, dtype: torch.dtype) -> PreTrainedModel:
        """The module on "meta". Raises UnsupportedModelError if its code fails."""
        module = build_module(self.config, dtype, trust_remote_code=self.trust_remote_code)
        module.tie_weights(recompute_mapping=False)
        return module

    def capture_attention(self, *, num_parameters: int) -> StepModel | ServedModel:
        """Capture the model's attention as serving it would.

        A model of moderate size is checked against its own attention too, with its weights, or random ones if they
        cannot be read. A large one stays on "meta", or gets zeros if its code looks at values, as routers do.

        Raises: UnsupportedModelError, with the reason.
        """
        if not self.is_large(num_parameters):
            return climb(
                self._with_weights(),
                num_positions=self.max_model_len,
                vocab_size=self.config.get_text_config().vocab_size,
                block_size=BLOCK_SIZE,
                dtype=torch.float32,
                compute_dtype=torch.float32,
                device=torch.device("cpu"),
            )
        try:
            return ServedModel(self.build(self.dtype), num_positions=self.max_model_len)
        except UnsupportedModelError:
            return ServedModel(fill_with_zeros(self.build(self.dtype)), num_positions=self.max_model_len)

    @staticmethod
    def is_large(num_parameters: int) -> bool:
        """Whether the model is looked at only for the first rung of the ladder, and not run against its own logits."""
        return num_parameters > MOST_CHECKED_PARAMETERS

    def _with_weights(self) -> PreTrainedModel:
        module = self.build(torch.float32)
        is_part = type(module.config) is not type(self.config)
        try:
            load_weights(module, self.path, torch.float32, is_part=is_part)
        except CheckpointError:
            module = self.build(torch.float32)
            load_dummy_weights(module)
        return module


def fill_with_zeros(module: PreTrainedModel) -> PreTrainedModel:
    """Give parameters on "meta" values of zero, in memory that the system provides when it is written: it never is."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                memory = torch.from_numpy(np.zeros(parameter.nbytes, dtype=np.uint8))
                zeros = memory.view(parameter.dtype).view(parameter.shape)
                setattr(owner, name, torch.nn.Parameter(zeros, requires_grad=False))
    return module
