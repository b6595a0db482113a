"""Linears of which every rank holds a part.

A rank's part of the output features (columns, in the words of parallel plans) may be several ranges: merged gate and up
projections, or fused query, key and value. A rank's bias of a row-cut linear is zero but on the first.
"""

from __future__ import annotations

from torch import nn

from shardwright.layers.parallel_module import GatheredOutput, Parallel, SplitInput, SummedOutput


class ColumnParallelLinear(Parallel, nn.Linear):
    """Some of the output features, which stay on this rank. [..., in] to [..., this rank's out]."""


class GatheredColumnParallelLinear(GatheredOutput, nn.Linear):
    """Some of the output features, put together on every rank. [..., in] to [..., out]."""


class RowParallelLinear(SummedOutput, nn.Linear):
    """Some of the input features: partial sums, added up. [..., this rank's in] to [..., out]."""


class SplitRowParallelLinear(SummedOutput, SplitInput, nn.Linear):
    """As RowParallelLinear, of an input that every rank has whole. [..., in] to [..., out]."""
