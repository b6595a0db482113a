"""Gated activations: what they compute, in plain PyTorch; kernels/triton/gated.py does it in one launch."""

from __future__ import annotations

from enum import StrEnum

import torch.nn.functional as F
from torch import Tensor


class Activation(StrEnum):
    """What is done to a gate."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    SIGMOID = "sigmoid"


def activate(values: Tensor, activation: Activation) -> Tensor:
    """An activation as torch has it."""
    match activation:
        case Activation.SILU:
            return F.silu(values)
        case Activation.GELU:
            return F.gelu(values)
        case Activation.GELU_TANH:
            return F.gelu(values, approximate="tanh")
        case Activation.RELU:
            return F.relu(values)
        case Activation.SIGMOID:
            return values.sigmoid()


def gated(both: Tensor, activation: Activation, *, is_gate_first: bool = True) -> Tensor:
    """Multiply one half of each row by the activation of the other.

    Args:
        both: [..., 2 * N], any floating type: gate and values, or values and gate.
        activation: of the gate; rounded to its type before the product is.
        is_gate_first: which half it is.

    Returns: [..., N], same type.
    """
    first, second = both.chunk(2, -1)
    gate, values = (first, second) if is_gate_first else (second, first)
    return activate(gate, activation) * values
