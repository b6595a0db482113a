"""Rotary tables kept from call to call for as long as the prompt's length does not change."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class RememberedConfig(PretrainedConfig):
    model_type = "remembered-length"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.n_positions = heads, n_positions
        super().__init__(**kwargs)


class Rotary(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim, self._seq_len_cached, self._cos, self._sin = dim, None, None, None

    def forward(self, x):
        length = x.shape[-2]
        if length != self._seq_len_cached:
            self._seq_len_cached = length
            inv_freq = 20.0 ** -(torch.arange(0, self.dim, 2, device=x.device) / self.dim)
            t = torch.arange(length, device=x.device).type_as(inv_freq)
            angles = torch.einsum("i,j->ij", t, inv_freq)
            self._cos, self._sin = angles.cos()[None, None], angles.sin()[None, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * self._cos - b * self._sin, a * self._sin + b * self._cos), dim=-1)


class Layer(nn.Module):
    def __init__(self, config, rotary):
        super().__init__()
        self.heads, self.rotary = config.heads, rotary
        self.norm = nn.LayerNorm(config.width)
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True)
        return (x + self.out(y.transpose(1, 2).reshape(b, t, c))).tanh()


class RememberedLM(PreTrainedModel):
    config_class = RememberedConfig

    def __init__(self, config):
        super().__init__(config)
        rotary = Rotary(config.width // config.heads)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, rotary) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
