"""scaled_dot_product_attention imported by name and called with keywords and enable_gqa; rotary from position_ids."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class GroupedConfig(PretrainedConfig):
    model_type = "grouped-queries"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=1,
        max_position_embeddings=256, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class Rotary(nn.Module):
    def __init__(self, dim, base=50.0):
        super().__init__()
        self.register_buffer("inv_freq", base ** -(torch.arange(0, dim, 2).float() / dim))

    def forward(self, x, position_ids):
        angles = position_ids[:, None, :, None].float() * self.inv_freq
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.norm = nn.RMSNorm(config.hidden_size)
        self.mlp_norm = nn.RMSNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.rotary = Rotary(self.head_dim)

    def forward(self, x, position_ids):
        b, t, c = x.shape
        fused = self.qkv(self.norm(x)).view(b, t, sum(self.heads), self.head_dim).transpose(1, 2)
        q, k, v = fused.split(self.heads, dim=1)
        q, k = self.rotary(q, position_ids), self.rotary(k, position_ids)
        y = scaled_dot_product_attention(query=q, key=k, value=v, is_causal=t > 1, scale=0.3, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(silu(self.up(self.mlp_norm(x))))


class GroupedLM(PreTrainedModel):
    config_class = GroupedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, position_ids=None, attention_mask=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, position_ids)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))
