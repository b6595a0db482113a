"""Where quantized weights may be cut: between groups of input features, which share a scale.

A rank's part then holds the codes and scales that the whole weight has, and N ranks compute with the numbers of one. So
features are dealt by whole groups, and heads by so many that they fill whole groups: with heads of 80 and groups of 32,
by two. What cannot be dealt so (two heads of 16 in one group of 32, to two ranks) is held whole by every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, lcm

from torch import nn

from shardwright.layers.quantized_linear import quantizable_linears, tied_heads
from shardwright.plans.groups import Member, Ranges, UnitGroup
from shardwright.weight_format import WeightFormat


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which weights of a model are quantized, and how."""

    format: WeightFormat
    inputs: Mapping[str, tuple[int, int]]
    """By every name of a quantized weight, its dimension of input features, and how many they are."""
    tied_heads: tuple[str, ...] = ()
    """Weights that are embeddings too, and as such stay as they are."""

    def quantum(self, group: UnitGroup) -> int:
        """How many units of a group have to be dealt together, so that no quantized group is cut."""
        cut = [member for member in group.members if self._is_cut(member.name, member.dim)]
        return lcm(1, *(self._quantum_of(member, group) for member in cut))

    def _quantum_of(self, member: Member, group: UnitGroup) -> int:
        """As one member asks for it; all units if its parts begin or end within quantized groups."""
        begin, end = member.span or (0, group.units)
        low, high = member.segments[0]
        features = (high - low) // member.units
        quantum = self.format.group_size // gcd(self.format.group_size, features) * ((end - begin) // member.units)
        is_apart = not self.splits(member.name, member.dim, member.segments)
        return quantum if is_apart and begin % quantum == 0 else group.units

    def splits(self, name: str, dim: int, ranges: Ranges) -> bool:
        """Whether ranges of a parameter's dimension begin or end within quantized groups."""
        if not self._is_cut(name, dim):
            return False
        length = self.inputs[name][1]
        return any(edge % self.format.group_size and edge != length for part in ranges for edge in part)

    def _is_cut(self, name: str, dim: int) -> bool:
        """Whether quantized groups lie along a dimension."""
        return name in self.inputs and self.inputs[name][0] == dim


def quantization_of(module: nn.Module, format: WeightFormat | None) -> Quantization | None:
    """What is quantized of a whole model, on "meta" or not; None if nothing shall be.

    Raises: UnsupportedModelError if nothing can be.
    """
    if format is None:
        return None
    dims = quantizable_linears(module)
    inputs = {name: (dim, module.get_parameter(name).shape[dim]) for name, dim in dims.items()}
    return Quantization(format, inputs, tied_heads(module))


def most_ranks(group: UnitGroup, quantization: Quantization | None) -> int:
    """How many ranks can have a part in a group."""
    return group.most_ranks(1 if quantization is None else quantization.quantum(group))
