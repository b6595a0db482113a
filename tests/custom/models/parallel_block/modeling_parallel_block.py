"""Attention and MLP side by side; tables of cosines sliced to the prompt; KV heads expanded; gives a dict."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class ParallelConfig(PretrainedConfig):
    model_type = "parallel-block"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, kv_heads=2, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.kv_heads, self.n_positions = heads, kv_heads, n_positions
        super().__init__(**kwargs)


def repeat_kv(x, n_rep):
    b, kv_heads, t, d = x.shape
    return x[:, :, None].expand(b, kv_heads, n_rep, t, d).reshape(b, kv_heads * n_rep, t, d)


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class ParallelBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.width // config.heads
        self.norm = nn.LayerNorm(config.width)
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.kv = nn.Linear(config.width, 2 * config.kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(config.width, config.width, bias=False)
        self.fc_in = nn.Linear(config.width, 2 * config.width)
        self.fc_out = nn.Linear(2 * config.width, config.width)

    def forward(self, x, cos, sin):
        b, t, c = x.shape
        h = self.norm(x)
        q = self.q(h).view(b, t, -1, self.head_dim).transpose(1, 2)
        k, v = self.kv(h).view(b, t, 2, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        n_rep = self.config.heads // self.config.kv_heads
        y = F.scaled_dot_product_attention(q, repeat_kv(k, n_rep), repeat_kv(v, n_rep), is_causal=True)
        return x + self.o(y.transpose(1, 2).reshape(b, t, c)) + self.fc_out(F.gelu(self.fc_in(h)))


class ParallelLM(PreTrainedModel):
    config_class = ParallelConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_in = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([ParallelBlock(config) for _ in range(config.depth)])
        self.final_norm = nn.LayerNorm(config.width)
        self.embed_out = nn.Linear(config.width, config.vocab_size, bias=False)
        dim = config.width // config.heads
        inv_freq = 1.0 / (200 ** (torch.arange(0, dim, 2).float() / dim))
        angles = torch.arange(config.n_positions).float()[:, None] * inv_freq[None]
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.post_init()

    def forward(self, input_ids, **kwargs):
        seq_len = input_ids.shape[-1]
        cos, sin = self.cos[:seq_len, :], self.sin[:seq_len, :]
        x = self.embed_in(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return {"logits": self.embed_out(self.final_norm(x)), "hidden": x}
