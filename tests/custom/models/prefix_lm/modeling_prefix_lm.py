"""The first four tokens see each other in both directions."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class PrefixConfig(PretrainedConfig):
    model_type = "prefix-lm"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, prefix=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.prefix, self.n_positions = heads, prefix, n_positions
        super().__init__(**kwargs)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width)
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x, mask):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return (x + self.out(y.transpose(1, 2).reshape(b, t, c))).tanh()


class PrefixLM(PreTrainedModel):
    config_class = PrefixConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.n_positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        t = input_ids.shape[1]
        mask = torch.ones(t, t, dtype=torch.bool, device=input_ids.device).tril()
        mask[: self.config.prefix, : self.config.prefix] = True
        x = self.tokens(input_ids) + self.positions(torch.arange(t, device=input_ids.device))
        for layer in self.layers:
            x = layer(x, mask)
        return CausalLMOutput(logits=self.head(x))
