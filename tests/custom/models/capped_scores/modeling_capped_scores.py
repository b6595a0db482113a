"""Soft-capped scores of normalised queries and keys; rotary tables over [1, 1, N, D], sliced on dim 2."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class CappedConfig(PretrainedConfig):
    model_type = "capped-scores"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, soft_cap=10.0, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.soft_cap = num_attention_heads, soft_cap
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.soft_cap = config.num_attention_heads, config.soft_cap
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        b, t, _c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = self.turn(self.q_norm(q), cos, sin), self.turn(self.k_norm(k), cos, sin)
        scores = torch.matmul(q, k.transpose(-1, -2)) * 1.5
        scores = torch.tanh(scores / self.soft_cap) * self.soft_cap
        future = torch.triu(torch.ones(t, t, dtype=torch.bool, device=x.device), diagonal=1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
        out = torch.matmul(scores.softmax(-1), v)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    @staticmethod
    def turn(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class CappedLM(PreTrainedModel):
    config_class = CappedConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.attentions = nn.ModuleList(Attention(config) for _ in range(config.num_hidden_layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(config.num_hidden_layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        half = width // config.num_attention_heads // 2
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), 40.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos()[None, None])
        self.register_buffer("sin", angles.sin()[None, None])
        self.post_init()

    def forward(self, input_ids, **kwargs):
        length = input_ids.shape[1]
        cos, sin = self.cos[:, :, :length], self.sin[..., :length, :]
        x = self.embed_tokens(input_ids)
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            x = x + attention(norm(x), cos, sin)
            x = x + mlp(x)
        return CausalLMOutput(logits=self.lm_head(x))
