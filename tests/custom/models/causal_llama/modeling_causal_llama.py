"""scaled_dot_product_attention with is_causal; rotary angles from arange; KV heads repeated with repeat_interleave."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LlamaishConfig(PretrainedConfig):
    model_type = "causal-llama"

    def __init__(self, vocab_size=128, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256, **kwargs):
        self.vocab_size, self.dim, self.n_layers = vocab_size, dim, n_layers
        self.n_heads, self.n_kv_heads, self.max_seq_len = n_heads, n_kv_heads, max_seq_len
        super().__init__(**kwargs)


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def rotate(x, angles):
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.h, self.kv = config.n_heads, config.n_kv_heads
        self.d = config.dim // config.n_heads
        self.wq = nn.Linear(config.dim, self.h * self.d, bias=False)
        self.wk = nn.Linear(config.dim, self.kv * self.d, bias=False)
        self.wv = nn.Linear(config.dim, self.kv * self.d, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, angles):
        b, t, c = x.shape
        q = rotate(self.wq(x).view(b, t, self.h, self.d).transpose(1, 2), angles)
        k = rotate(self.wk(x).view(b, t, self.kv, self.d).transpose(1, 2), angles)
        v = self.wv(x).view(b, t, self.kv, self.d).transpose(1, 2)
        k = k.repeat_interleave(self.h // self.kv, dim=1)
        v = v.repeat_interleave(self.h // self.kv, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm, self.ffn_norm = RMSNorm(config.dim), RMSNorm(config.dim)
        self.attention = Attention(config)
        self.w1 = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.w2 = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, 2 * config.dim, bias=False)

    def forward(self, x, angles):
        x = x + self.attention(self.attention_norm(x), angles)
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Llamaish(PreTrainedModel):
    config_class = LlamaishConfig

    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        half = self.config.dim // self.config.n_heads // 2
        freqs = 1.0 / 100.0 ** (torch.arange(half, device=input_ids.device).float() / half)
        t = torch.arange(input_ids.shape[1], device=input_ids.device).float()
        angles = torch.outer(t, freqs)
        x = self.tok_embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, angles)
        return CausalLMOutput(logits=self.output(self.norm(x)))
