"""Random weights that make mistakes visible: no norm is 1, no bias is 0, and activations neither explode nor vanish."""

from __future__ import annotations

from math import prod, sqrt

import torch
from torch import Tensor, nn

from shardwright.plans.resolve import has_inputs_first, parameters_of

BIAS_SPREAD = 0.2
"""Of biases, beside outputs of about 1: adding one twice shows, and no sum drowns in them."""


def fill_randomly(module: nn.Module, *, seed: int) -> None:
    """Give every parameter of a module, on "meta" or not, random float32 values on the CPU; tied ones stay tied.

    Matrices keep the size of what they multiply, scales of norms lie between 0.5 and 1.5, embeddings spread by 1.

    Args:
        module: its parameters are replaced, not written to.
        seed: the same values for the same seed and names.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, aliases, parameter, owner in parameters_of(module):
        values = _values(name.rpartition(".")[2], tuple(parameter.shape), owner, generator)
        replacement = nn.Parameter(values, requires_grad=False)
        for path in (name, *aliases):
            holder, _, leaf = path.rpartition(".")
            module.get_submodule(holder)._parameters[leaf] = replacement


def _values(leaf: str, shape: tuple[int, ...], owner: nn.Module, generator: torch.Generator) -> Tensor:
    if leaf.endswith("bias"):
        return BIAS_SPREAD * torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return 0.5 + torch.rand(shape, generator=generator)
    if isinstance(owner, nn.Embedding):
        return torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) / sqrt(_inputs(shape, owner))


def _inputs(shape: tuple[int, ...], owner: nn.Module) -> int:
    """How many numbers a matrix sums up for one of its outputs."""
    if has_inputs_first(owner):
        return shape[0]
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return prod(shape[1:])
    return max(shape[-2:]) if len(shape) > 2 else shape[-1]
