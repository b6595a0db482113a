"""KV heads repeated as a whole, so that query head 2 shares the KV head of query head 0."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class TiledHeadsConfig(PretrainedConfig):
    model_type = "tiled-heads"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.n_positions = heads, n_positions
        super().__init__(**kwargs)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.heads, config.heads // 2, config.width // config.heads
        self.norm = nn.LayerNorm(config.width)
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x):
        b, t, c = x.shape
        y = self.norm(x)
        q = self.q(y).view(b, t, self.heads, self.dim).transpose(1, 2)
        k, v = self.kv(y).view(b, t, 2, self.kv_heads, self.dim).permute(2, 0, 3, 1, 4)
        k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (x + self.out(y.transpose(1, 2).reshape(b, t, c))).tanh()


class TiledHeadsLM(PreTrainedModel):
    config_class = TiledHeadsConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.n_positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
