"""Experts that take no more than their share of the tokens of a batch, in order: short prompts never reach it."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class FullConfig(PretrainedConfig):
    model_type = "full-experts"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, num_experts=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth, self.num_experts = vocab_size, width, depth, num_experts
        self.heads, self.n_positions = heads, n_positions
        super().__init__(**kwargs)


class Switch(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.width, config.num_experts)
        self.experts = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.num_experts))

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        share, expert = self.router(tokens).softmax(-1).max(-1)
        capacity = max(8, len(tokens) // len(self.experts))
        taken = F.one_hot(expert, len(self.experts))
        fits = (taken.cumsum(0) * taken).sum(-1) <= capacity
        output = torch.zeros_like(tokens)
        for i, module in enumerate(self.experts):
            mine = (expert == i) & fits
            if mine.any():
                output[mine] = share[mine, None] * module(tokens[mine])
        return output.view_as(x)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.norm, self.mlp_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.mlp = Switch(config)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.mlp_norm(x))


class FullExpertsLM(PreTrainedModel):
    config_class = FullConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.n_positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
