"""Cosines of queries and keys, with a temperature that each head has learned; positions by narrowing a table."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class CosineConfig(PretrainedConfig):
    model_type = "cosine-scores"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.n_positions = heads, n_positions
        super().__init__(**kwargs)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width)
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.temperature = nn.Parameter(torch.zeros(config.heads))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = scores * (2.0 + 4.0 * self.temperature).exp().clamp(max=100.0).view(-1, 1, 1)
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(b, t, c))


class CosineLM(PreTrainedModel):
    config_class = CosineConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.n_positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids) + self.positions.weight.narrow(0, 0, input_ids.size(1))
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
