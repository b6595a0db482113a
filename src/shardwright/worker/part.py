"""The part of a model that one rank holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from shardwright.config import EngineConfig
from shardwright.worker.blueprint import Blueprint
from shardwright.worker.placement import Peers, Placement

if TYPE_CHECKING:
    from shardwright.plans.quantization import Quantization


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart:
    """What a rank loaded."""

    module: nn.Module
    architecture: str
    """Class of the whole model."""
    num_parameters: int
    """Of the whole model."""
    agree: Callable[[bool], bool] = bool
    """Whether all ranks say yes; each asks after the same forward passes, whatever went wrong in them."""


def load_part(
    blueprint: Blueprint, config: EngineConfig, placement: Placement, peers: Peers | None, device: torch.device
) -> ModelPart:
    """Load what a rank holds of a model.

    Args:
        blueprint: of the model.
        config: of the engine.
        placement: of the rank.
        peers: the ranks that hold the rest; None: there are none.
        device: where it will run; it is loaded on the CPU.

    Raises: CheckpointError, UnsupportedModelError; PlanError if the model cannot be cut so.
    """
    if peers is not None:
        from shardwright.worker.cut import load_cut

        return load_cut(blueprint, config, placement, peers, device)
    module = blueprint.load(dummy=config.model.load_format == "dummy")
    num_parameters = count_parameters(module)
    if config.model.weight_format is not None:
        from shardwright.plans.quantization import quantization_of

        quantize(module, quantization_of(module, config.model.weight_format), device)
    return ModelPart(module=module, architecture=type(module).__name__, num_parameters=num_parameters)


def quantize(module: nn.Module, quantization: Quantization | None, device: torch.device) -> None:
    """Quantize the linears of a loaded module, in place, if they shall be."""
    if quantization is None:
        return
    from shardwright.kernels.packed_linear import is_available
    from shardwright.layers.quantized_linear import quantize_linears

    quantize_linears(module, quantization.inputs, quantization.format)
    if device.type == "cpu" and is_available():
        quantize_linears(module, quantization.tied_heads, quantization.format.of_heads)


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters, tied ones once."""
    return sum(p.numel() for p in module.parameters())
