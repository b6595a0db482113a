"""How the weights of linears are kept when they are quantized: a plain record that anybody may import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BLOCK = 32
"""Codes of an output lie in blocks of so many inputs, the last one filled up: what kernels read at once."""

SCALE_BYTES = 2
"""Of a group's scale, and of its minimum: bfloat16."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Integers of a few bits, and numbers in bfloat16 that scale groups of them.

    A group is `group_size` neighbouring input features of one output feature, counted from the first; the last may be
    shorter. A weight is `scale * code` with codes -127 to 127 in 8 bits, and `scale * code + minimum` with codes 0 to
    15 in 4 bits, where a symmetric range would waste one code in sixteen.
    """

    bits: Literal[8, 4]
    group_size: int

    @property
    def has_minimums(self) -> bool:
        """Whether a group has a minimum beside its scale."""
        return self.bits == 4

    @property
    def of_heads(self) -> WeightFormat:
        """What a head that is tied to an embedding is kept in: 8 bits, whatever others are."""
        return WeightFormat(8, self.group_size)

    def num_groups(self, inputs: int) -> int:
        """Of one output with so many inputs."""
        return -(-inputs // self.group_size)

    def code_bytes(self, inputs: int) -> int:
        """Of the codes of one output with so many inputs."""
        return -(-inputs // BLOCK) * BLOCK * self.bits // 8

    def num_bytes(self, outputs: int, inputs: int) -> int:
        """Of the weight of a linear, all told."""
        per_group = SCALE_BYTES * (2 if self.has_minimums else 1)
        return outputs * (self.code_bytes(inputs) + self.num_groups(inputs) * per_group)

    def __str__(self) -> str:
        return f"int{self.bits} in groups of {self.group_size}"
