"""ALiBi as slope times the position of the key, in a buffer; a mask of -1e9 in another."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class AlibiBufferConfig(PretrainedConfig):
    model_type = "alibi-buffer"

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
        slopes = torch.tensor([2 ** (-8 * (i + 1) / config.heads) for i in range(config.heads)])
        self.register_buffer("alibi", (slopes[:, None] * torch.arange(config.n_positions))[None, :, None, :])
        self.register_buffer("mask", torch.full((config.n_positions, config.n_positions), -1e9).triu(1))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(2, 3)).div(4).add(self.alibi[..., :t])
        y = torch.softmax(scores + self.mask[:t, :t], dim=-1) @ v
        return (x + self.out(y.transpose(1, 2).reshape(b, t, c))).tanh()


class AlibiBufferLM(PreTrainedModel):
    config_class = AlibiBufferConfig

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
