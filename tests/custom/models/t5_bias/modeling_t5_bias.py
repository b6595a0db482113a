"""Relative positions in buckets, as in T5: each has a learned bias per head, shared by all layers; no scale."""

import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class T5BiasConfig(PretrainedConfig):
    model_type = "t5-bias"

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

    def forward(self, x, bias):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = 0.3 * torch.einsum("bnqd,bnkd->bnqk", q, k) + bias
        y = torch.einsum("bnqk,bnkd->bnqd", torch.softmax(scores.float(), dim=-1).type_as(scores), v)
        return (x + self.out(y.transpose(1, 2).reshape(b, t, c))).tanh()


def buckets(distance, num_buckets=16, max_distance=40):
    distance, exact = distance.clamp(min=0), num_buckets // 2
    share = torch.log(distance.float() / exact + 1e-6) / math.log(max_distance / exact)
    far = (exact + share * (num_buckets - exact)).long().clamp(max=num_buckets - 1)
    return torch.where(distance < exact, distance, far)


class T5BiasLM(PreTrainedModel):
    config_class = T5BiasConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.relative = nn.Embedding(16, config.heads)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        i = torch.arange(input_ids.shape[1], device=x.device)
        bias = self.relative(buckets(i[:, None] - i[None, :])).permute(2, 0, 1)[None]
        bias = bias.masked_fill(i[None, :] > i[:, None], float("-inf"))
        for layer in self.layers:
            x = layer(x, bias)
        return CausalLMOutput(logits=self.head(x))
