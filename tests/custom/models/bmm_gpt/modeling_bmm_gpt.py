"""Attention written out with bmm over [B*H, T, D]; an additive mask per forward; layers as numbered attributes."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BmmConfig(PretrainedConfig):
    model_type = "bmm-gpt"

    def __init__(self, vocab_size=128, hidden_size=64, num_layers=2, num_heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.num_heads, self.n_positions = num_heads, n_positions
        super().__init__(**kwargs)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.hidden_size // config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _shape(self, x):
        b, t, _ = x.shape
        x = x.view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        return x.reshape(b * self.num_heads, t, self.head_dim)

    def forward(self, x, mask):
        b, t, c = x.shape
        q = self._shape(self.q_proj(x) * self.head_dim**-0.5)
        k, v = self._shape(self.k_proj(x)), self._shape(self.v_proj(x))
        weights = torch.bmm(q, k.transpose(1, 2))
        weights = weights.view(b, self.num_heads, t, t) + mask
        weights = nn.functional.softmax(weights.view(b * self.num_heads, t, t), dim=-1)
        out = torch.bmm(weights, v)
        assert out.size() == (b * self.num_heads, t, self.head_dim)
        return self.out_proj(out.view(b, self.num_heads, t, -1).transpose(1, 2).reshape(b, t, c))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config)
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.fc2 = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, x, mask):
        x = x + self.attention(self.norm1(x), mask)
        return x + self.fc2(self.fc1(self.norm2(x)).relu())


class BmmGPT(PreTrainedModel):
    config_class = BmmConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.n_positions, config.hidden_size)
        for i in range(config.num_layers):
            setattr(self, f"layer_{i}", Layer(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, use_cache=None):
        b, t = input_ids.shape
        mask = torch.zeros(t, t, device=input_ids.device)
        mask = mask + torch.triu(torch.full_like(mask, float("-inf")), 1)
        x = self.tokens(input_ids)
        x = x + self.positions(torch.arange(t, device=x.device).unsqueeze(0).expand(b, t))
        for i in range(self.config.num_layers):
            x = getattr(self, f"layer_{i}")(x, mask[None, None])
        return CausalLMOutput(logits=self.lm_head(x))
