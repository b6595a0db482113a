"""Linears whose weights are kept in 8 or 4 bits.

Only the weights are: inputs, sums and outputs are what they were. A linear is quantized in place when its weights are
loaded, whole or this rank's part of it; a part that is cut between groups holds the codes of the whole.

Quantized is every linear that has its weight to itself, and where codes are multiplied natively also a head that is
tied to the embedding, which keeps the weight as it is. Left alone are other weights that several modules have;
embeddings; experts in one stacked tensor; and subclasses of nn.Linear, whose forward may do something else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from shardwright.errors import UnsupportedModelError
from shardwright.kernels.packed_codes import PackedCodes, coded_linear, pack_codes, unpack_codes
from shardwright.kernels.quantized_linear import quantized_linear
from shardwright.kernels.quantized_weight import QuantizedWeight, dequantize, quantize
from shardwright.layers.parallel import combined
from shardwright.layers.upcast_linear import has_fast_half_products
from shardwright.weight_format import WeightFormat


class Quantized(nn.Module):
    """In front of a linear: its product, with a weight of codes and scales."""

    quantized_weight: QuantizedWeight | PackedCodes
    """What stands for the weight."""
    wide_bias: Tensor | None
    """In float32, of packed codes."""
    bias: Any
    weight_dtype: torch.dtype
    """As it was loaded."""

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs], for code that asks for it instead of calling the module: made anew each time."""
        return dequantize(self._unpacked()).to(self.weight_dtype)

    @property
    def quantized_bytes(self) -> int:
        """Of codes, scales and minimums."""
        return self.quantized_weight.num_bytes

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs], dtype of the input."""
        weight = self.quantized_weight
        if isinstance(weight, PackedCodes):
            rows = input.reshape(math.prod(input.shape[:-1]), weight.inputs)
            return coded_linear(rows, weight, self.wide_bias).view(*input.shape[:-1], weight.outputs)
        is_wide = input.dtype is torch.float32 or (input.device.type == "cpu" and not has_fast_half_products())
        compute_dtype = torch.float32 if is_wide else input.dtype
        rows = input.reshape(-1, weight.inputs)
        output = quantized_linear(rows, weight, self.bias, compute_dtype=compute_dtype)
        return output.view(*input.shape[:-1], weight.outputs)

    def pack(self) -> None:
        """Take the codes, which are on the CPU, to where the native product reads them."""
        self.quantized_weight = pack_codes(self._unpacked())
        self.wide_bias = None if self.bias is None else self.bias.detach().float()

    def _unpacked(self) -> QuantizedWeight:
        weight = self.quantized_weight
        return unpack_codes(weight) if isinstance(weight, PackedCodes) else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device with the module, not packed; types stay as kernels know them."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it
        weight = self._unpacked()
        self.quantized_weight = weight.to(fn(weight.codes).device)
        return self


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[override]  # the weight can only be read
    """nn.Linear with a quantized weight."""


class QuantizedInputsFirst(Quantized):
    """In front of Transformers' Conv1D, which has its weight the other way round."""

    @property
    def weight(self) -> Tensor:
        """[inputs, outputs]."""
        return super().weight.T


def quantizable_linears(module: nn.Module) -> dict[str, int]:
    """Weights that can be quantized, and which of their dimensions are input features.

    Args:
        module: whole, on "meta" or not, its weights tied.

    Returns: by every qualified name that a weight has. Raises UnsupportedModelError if there are none.
    """
    owners = Counter(id(p) for held in module.modules() for p in held.parameters(recurse=False))
    found = {}
    for name, held in module.named_modules(remove_duplicate=False):
        dim = input_dim(held)
        if dim is not None and owners[id(held.weight)] == 1:
            found[f"{name}.weight"] = dim
    if not found:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no linear whose weight can be quantized: use --quantization none"
        )
    return found


def tied_heads(module: nn.Module) -> tuple[str, ...]:
    """Weights of linears that are embeddings too, of a module that is whole, by qualified name."""
    embeddings = {id(held.weight) for held in module.modules() if isinstance(held, nn.Embedding)}
    heads = [name for name, held in module.named_modules() if type(held) is nn.Linear and id(held.weight) in embeddings]
    return tuple(f"{name}.weight" for name in heads)


def quantize_linears(module: nn.Module, weights: Iterable[str], format: WeightFormat) -> None:
    """Replace weights of a module by quantized ones, in place, one after another.

    Args:
        module: whole or this rank's part of it, with its weights.
        weights: of the whole module, from `quantizable_linears` or `tied_heads`; those of other pipeline stages are
            empty here.
        format: of all of them.
    """
    for name in weights:
        held: Any = module.get_submodule(name.rpartition(".")[0])
        if not isinstance(held, Quantized) and held.weight.ndim == 2:
            _quantize(held, format)


def input_dim(held: nn.Module) -> int | None:
    """The dimension of a linear's weight that are its inputs; None if the module is no plain linear."""
    return 1 if type(held) is nn.Linear else 0 if is_inputs_first(type(held)) else None


def is_inputs_first(kind: type[nn.Module]) -> bool:
    """Whether a class is Transformers' Conv1D, known by its name: it need not be imported."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _quantize(held: Any, format: WeightFormat) -> None:
    own = next(kind for kind in type(held).__mro__ if kind is nn.Linear or is_inputs_first(kind))
    weight = held._parameters.pop("weight").detach()
    made = quantize(weight if own is nn.Linear else weight.T, format)
    held.__class__ = _quantized_class(type(held), own)
    held.quantized_weight, held.weight_dtype = made, weight.dtype


def _quantized_class(kind: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """A class that stands behind parts of parallel modules, with the linear at its end quantized."""
    if kind is nn.Linear:
        return QuantizedLinear
    if kind is own:
        return _quantized_inputs_first((QuantizedInputsFirst, own))
    *parts, last = kind.__bases__
    return combined((*parts, _quantized_class(last, own)))


@cache
def _quantized_inputs_first(bases: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    return type(f"Quantized{bases[-1].__name__}", bases, {"__module__": bases[-1].__module__})
