"""What a module of a sharded model does beside its own forward pass: split its input, gather or sum its output.

Each of these is a class to put in front of the module's own, which keeps its forward, its names and its parameters:

    class RowParallelLinear(SummedOutput, nn.Linear)

`layers.parallel.become` does that to a module of any class, in place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shardwright.layers.collectives import Collectives
from shardwright.layers.parallel_pieces import Pieces


class Parallel(nn.Module):
    """A module that other ranks hold parts of."""

    collectives: Collectives
    """Of the ranks that hold the other parts."""


class SplitInput(Parallel):
    """Takes this rank's part of an input that is given whole."""

    input_pieces: Pieces
    """Of the last dimension of the input."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[..., total] in, whatever the module makes of its part out."""
        return super().forward(self.input_pieces.take(input, self.collectives.rank, -1), *args, **kwargs)


class GatheredOutput(Parallel):
    """Puts the parts of its output together on every rank."""

    output_pieces: Pieces
    """Of the last dimension of the output."""
    makes_logits: bool = False
    """It is the head of a language model."""
    only_first_rank: bool = False
    """Rank 0 alone gets the output, the others zeros: for logits that nobody else reads."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, with a whole last dimension."""
        output = super().forward(*args, **kwargs)
        if self.only_first_rank:
            return self.output_pieces.gather_first(output, self.collectives)
        return self.output_pieces.gather(output, self.collectives)


class SummedOutput(Parallel):
    """Adds its output up over the ranks; of several outputs the first, others are taken to be the same everywhere."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        output = super().forward(*args, **kwargs)
        if isinstance(output, Tensor):
            return self.collectives.all_reduce(output)
        if isinstance(output, tuple) and isinstance(output[0], Tensor):
            first = self.collectives.all_reduce(output[0])
            return (first, *output[1:])
        return output


class DividedInput(Parallel):
    """Divides its input by the number of ranks: an expert that returns what it is given, and is summed with others."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module makes of a share of the input."""
        return super().forward(input / self.collectives.size, *args, **kwargs)
