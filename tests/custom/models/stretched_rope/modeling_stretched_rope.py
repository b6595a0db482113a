"""Rotary frequencies that stretch with the prompt, once it is longer than those of training: no cache is right."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class StretchedConfig(PretrainedConfig):
    model_type = "stretched-rope"

    def __init__(
        self, vocab_size=128, width=64, depth=2, heads=4, trained_length=24, max_position_embeddings=256, **kwargs
    ):
        self.vocab_size, self.width, self.depth, self.heads = vocab_size, width, depth, heads
        self.trained_length, self.max_position_embeddings = trained_length, max_position_embeddings
        super().__init__(**kwargs)


def rotate(x, base):
    length, dim = x.shape[-2:]
    angles = torch.outer(torch.arange(length), base ** -(torch.arange(0, dim, 2) / dim))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.trained_length = config.heads, config.trained_length
        self.norm = nn.LayerNorm(config.width)
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dim = c // self.heads
        base = 100.0 * max(1.0, 2 * t / self.trained_length - 1) ** (dim / (dim - 2))
        y = F.scaled_dot_product_attention(rotate(q, base), rotate(k, base), v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(b, t, c))


class StretchedLM(PreTrainedModel):
    config_class = StretchedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
