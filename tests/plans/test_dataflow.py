"""What a layer's values are made of, as one recorded pass shows it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardwright.plans.dataflow import trace_dataflow
from shardwright.plans.handover import uncuttable

HIDDEN = 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        written = hidden * 2
        written.add_(1)
        return self.linear(written) + hidden


class Reusing(nn.Module):
    """Between its layers it makes a tensor out of nothing, which may lie where a layer's own was written before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(HIDDEN, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        steps: list[Tensor] = []
        for layer in self.layers:
            hidden = layer(hidden)
            steps += [torch.zeros(HIDDEN) for _ in range(8)]
        return self.head(hidden + sum(steps))


def test_memory_that_was_anothers_before_says_nothing() -> None:
    with torch.device("meta"):
        module = Reusing()
    flow = trace_dataflow(module, [f"layers.{i}" for i in range(4)])
    assert uncuttable(flow) == frozenset()
