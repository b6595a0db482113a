"""Keys and values made of a latent by one linear, with a rotary key that heads share; scaled_dot_product_attention."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LatentConfig(PretrainedConfig):
    model_type = "latent-sdpa"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, kv_rank=16, nope_dim=16,
        rope_dim=8, value_dim=12, max_position_embeddings=256, up_bias=False, turns_all=False, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.kv_rank = num_attention_heads, kv_rank
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.max_position_embeddings = max_position_embeddings
        self.up_bias, self.turns_all = up_bias, turns_all
        super().__init__(**kwargs)


def turn(x, position_ids):
    half = x.shape[-1] // 2
    angles = position_ids[:, None, :, None].float() * 30.0 ** -(torch.arange(half, device=x.device) / half)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class LatentAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.sizes = (config.nope_dim, config.rope_dim, config.value_dim)
        self.heads, self.rank, self.turns_all = config.num_attention_heads, config.kv_rank, config.turns_all
        self.q_proj = nn.Linear(config.hidden_size, self.heads * (config.nope_dim + config.rope_dim), bias=False)
        self.down = nn.Linear(config.hidden_size, config.kv_rank + config.rope_dim, bias=False)
        self.latent_norm = nn.RMSNorm(config.kv_rank)
        self.up = nn.Linear(config.kv_rank, self.heads * (config.nope_dim + config.value_dim), bias=config.up_bias)
        self.out = nn.Linear(self.heads * config.value_dim, config.hidden_size, bias=False)

    def forward(self, x, position_ids):
        batch, length, _ = x.shape
        nope, rope, value = self.sizes
        q = self.q_proj(x).view(batch, length, -1, nope + rope).transpose(1, 2)
        q = torch.cat([q[..., :nope], turn(q[..., nope:], position_ids)], dim=-1)
        latent, k_rope = self.down(x).split([self.rank, rope], dim=-1)
        kv = self.up(self.latent_norm(latent)).view(batch, length, -1, nope + value).transpose(1, 2)
        k_nope, v = kv.split([nope, value], dim=-1)
        if self.turns_all:
            k_nope = turn(k_nope, position_ids)
        k_rope = turn(k_rope[:, None], position_ids).expand(-1, k_nope.shape[1], -1, -1)
        y = F.scaled_dot_product_attention(q, torch.cat([k_nope, k_rope], dim=-1), v, is_causal=True, scale=0.4)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class LatentLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = LatentAttention(config)
        self.norm, self.mlp_norm = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.fc2 = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, position_ids):
        x = x + self.attention(self.norm(x), position_ids)
        return x + self.fc2(F.silu(self.fc1(self.mlp_norm(x))))


class LatentLM(PreTrainedModel):
    config_class = LatentConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LatentLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, position_ids=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, position_ids)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))
