"""A learned bias per head and distance, clipped at 32 tokens, gathered out of each layer's own table."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ClippedRelativeConfig(PretrainedConfig):
    model_type = "clipped-relative"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.n_positions = heads, n_positions
        super().__init__(**kwargs)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width)
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.table = nn.Parameter(torch.randn(config.heads, 33))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        i = torch.arange(t, device=x.device)
        distance = i.view(-1, 1) - i.view(1, -1)
        scores = q @ k.mT * 0.25
        scores += self.table[:, distance.clamp(0, 32)]
        scores.masked_fill_(distance < 0, -torch.inf)
        y = scores.softmax(dim=-1) @ v
        return (x + self.out(y.transpose(1, 2).reshape(b, t, c))).tanh()


class ClippedRelativeLM(PreTrainedModel):
    config_class = ClippedRelativeConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
