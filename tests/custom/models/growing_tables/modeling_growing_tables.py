"""A rotary buffer that grows with the prompt, masks behind lru_cache, one head of keys and values for all queries."""

import functools

import torch
from torch import einsum, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class GrowingConfig(PretrainedConfig):
    model_type = "growing-tables"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, max_position_embeddings=1024, **kwargs):
        self.vocab_size, self.width, self.depth, self.heads = vocab_size, width, depth, heads
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


@functools.lru_cache(maxsize=8)
def future(length):
    return torch.arange(length)[None, :] > torch.arange(length)[:, None]


def rotate_half(x):
    x1, x2 = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    return torch.cat((-x2, x1), dim=-1)


class ParallelLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config.width // config.heads
        self.heads, self.scale, self.dims = config.heads, dim**-0.5, (config.width, dim, dim, 2 * config.width)
        self.norm = nn.LayerNorm(config.width)
        self.fused = nn.Linear(config.width, sum(self.dims), bias=False)
        self.attn_out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_out = nn.Sequential(nn.GELU(), nn.Linear(2 * config.width, config.width, bias=False))
        self.register_buffer("inv_freq", 1.0 / 100 ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("angles", None, persistent=False)

    def get_angles(self, n):
        if self.angles is not None and self.angles.shape[-2] >= n:
            return self.angles[:n]
        freqs = einsum("i , j -> i j", torch.arange(n), self.inv_freq)
        self.register_buffer("angles", torch.cat((freqs, freqs), dim=-1), persistent=False)
        return self.angles

    def forward(self, x):
        q, k, v, y = self.fused(self.norm(x)).split(self.dims, dim=-1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        angles = self.get_angles(x.shape[1])
        q, k = (t * angles.cos() + rotate_half(t) * angles.sin() for t in (q, k))
        scores = einsum("b h i d, b j d -> b h i j", q * self.scale, k)
        scores = scores.masked_fill(future(x.shape[1]), -torch.finfo(scores.dtype).max)
        weights = (scores - scores.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        out = einsum("b h i j, b j d -> b h i d", weights, v).transpose(1, 2).flatten(2)
        return x + self.attn_out(out) + self.mlp_out(y)


class GrowingLM(PreTrainedModel):
    config_class = GrowingConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(ParallelLayer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
