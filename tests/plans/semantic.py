"""A causal language model under names of its author's own, with the plans that belong to it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FEATURES = 96, 64, 4, 2, 16, 128

TP: dict[str, str] = {
    "causal_lm.embedding": "embedding_rowwise",
    "causal_lm.layer_stack.layers.*.attention.query_linear": "colwise",
    "causal_lm.layer_stack.layers.*.attention.key_linear": "colwise",
    "causal_lm.layer_stack.layers.*.attention.value_linear": "colwise",
    "causal_lm.layer_stack.layers.*.attention.output_linear": "rowwise",
    "causal_lm.layer_stack.layers.*.feedforward.gate": "colwise",
    "causal_lm.layer_stack.layers.*.feedforward.up": "colwise",
    "causal_lm.layer_stack.layers.*.feedforward.down": "rowwise",
    "lm_head": "colwise_rep",
}

PP: dict[str, Any] = {
    "causal_lm.embedding": (["input_ids"], ["hidden_states"]),
    "causal_lm.layer_stack.layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "causal_lm.layer_stack.final_norm": (["hidden_states"], ["hidden_states"]),
    "lm_head": (["hidden_states"], ["logits"]),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_linear = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.key_linear = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.value_linear = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.output_linear = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        batch, length, _ = hidden_states.shape
        q, k, v = (
            linear(hidden_states).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
            for linear in (self.query_linear, self.key_linear, self.value_linear)
        )
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        scores = scores + torch.full((length, length), float("-inf"), device=q.device).triu(1)
        if attention_mask is not None:
            scores = scores + attention_mask
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        return self.output_linear(mixed)  # type: ignore[no-any-return]  # nn.Module's call


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, FEATURES, bias=False)
        self.up = nn.Linear(WIDTH, FEATURES, bias=False)
        self.down = nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]  # as above


class PreLNLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.feedforward = Attention(), FeedForward()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), attention_mask)
        return hidden_states + self.feedforward(self.feedforward_norm(hidden_states))  # type: ignore[no-any-return]


class LayerStack(nn.Module):
    def __init__(self, num_layers: int, container: str) -> None:
        super().__init__()
        layers = [PreLNLayer() for _ in range(num_layers)]
        self.layers: nn.Module
        if container == "dict":
            self.layers = nn.ModuleDict({f"layer_{i}": layer for i, layer in enumerate(layers)})
        else:
            self.layers = nn.ModuleList(layers)
        self.final_norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers.children():
            hidden_states = layer(hidden_states, attention_mask)
        return self.final_norm(hidden_states)  # type: ignore[no-any-return]  # as above


class CausalLM(nn.Module):
    def __init__(self, num_layers: int, container: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layer_stack = LayerStack(num_layers, container)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer_stack(self.embedding(input_ids))  # type: ignore[no-any-return]  # as above


class SemanticModel(nn.Module):
    """The whole: token ids in, logits out."""

    _tp_plan = TP
    _pp_plan = PP
    _no_split_modules = ("PreLNLayer",)

    def __init__(self, *, num_layers: int = 4, container: str = "list", tied: bool = False) -> None:
        super().__init__()
        self.causal_lm = CausalLM(num_layers, container)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.causal_lm.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.causal_lm(input_ids))  # type: ignore[no-any-return]  # as above


def semantic_model(**options: Any) -> SemanticModel:
    """On "meta"."""
    with torch.device("meta"):
        return SemanticModel(**options).eval()
