"""Attention without softmax, as running sums over the prompt, and no cache."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LinearConfig(PretrainedConfig):
    model_type = "linear-attention"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.n_positions = heads, n_positions
        super().__init__(**kwargs)


class LinearAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).unbind(2)
        q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        states = torch.cumsum(k[..., :, None] * v[..., None, :], dim=1)
        norms = (q * torch.cumsum(k, dim=1)).sum(-1, keepdim=True)
        y = (q[..., None, :] @ states).squeeze(-2) / norms
        return self.out(y.reshape(b, t, c))


class LinearLM(PreTrainedModel):
    config_class = LinearConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.mixers = nn.ModuleList(LinearAttention(config) for _ in range(config.depth))
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
            x = x + torch.tanh(x)
        return CausalLMOutput(logits=self.head(x))
