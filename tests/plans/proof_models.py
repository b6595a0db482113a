"""Models and plans for tests of proofs: tiny ones of Transformers, on "meta", and one by an author of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tests.zoo.architectures import FULL, MIXED, SLIDING
from tests.zoo.builder import make_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardwright.models.build import build_module
from shardwright.plans.plan import ParallelPlan

FIELDS: dict[str, dict[str, Any]] = {**FULL, **SLIDING, **MIXED}


def zoo_model(model_type: str, **fields: Any) -> PreTrainedModel:
    """A tiny model of Transformers, its parameters on "meta"."""
    config = make_config(model_type, FIELDS.get(model_type, {}) | fields)
    module = build_module(config, torch.float32, trust_remote_code=False)
    module.tie_weights(recompute_mapping=False)
    return module


def with_entries(plan: ParallelPlan, **words: str | None) -> ParallelPlan:
    """A plan in which the entries that end in some names say something else, or are gone; one at least for each."""
    tp = dict(plan.tp)
    for ending, word in words.items():
        entries = [entry for entry in tp if entry.endswith(ending)]
        assert entries, f"{ending} is in no entry"
        for entry in entries:
            if word is None:
                del tp[entry]
            else:
                tp[entry] = word
    return replace(plan, tp=tp)


VOCAB, WIDTH, HEADS, HEAD_DIM, FEATURES, LAYERS = 50, 48, 6, 8, 80, 3


class FusedBlock(nn.Module):
    """Query, key and value in one projection, head by head; gate and up in one, one after the other; biases."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.gate_up = nn.Linear(WIDTH, 2 * FEATURES)
        self.down = nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, length, -1, 3, HEAD_DIM).permute(3, 0, 2, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]  # nn.Module's call


class FusedModel(nn.Module):
    """Layers in a ModuleDict, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleDict({f"block_{i}": FusedBlock() for i in range(LAYERS)})
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]  # nn.Module's call


FUSED_PLAN = ParallelPlan(
    tp={
        "embedding": "embedding_rowwise",
        "blocks.*.qkv": "colwise",
        "blocks.*.out": "rowwise",
        "blocks.*.gate_up": "packed_colwise",
        "blocks.*.down": "rowwise",
        "head": "colwise_gather_output",
    },
    tp_source="argument",
)
