"""baddbmm adds mask and scale; rotary tables grow when a longer prompt comes; layers in a Sequential."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BaddbmmConfig(PretrainedConfig):
    model_type = "baddbmm-net"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.n_positions = heads, n_positions
        super().__init__(**kwargs)


class Rotary(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim, self.cos, self.sin = dim, None, None

    def forward(self, x):  # [N, T, D]
        length = x.shape[1]
        if self.cos is None or length > self.cos.shape[0]:
            frequencies = 30.0 ** -(torch.arange(0, self.dim, 2, device=x.device).float() / self.dim)
            angles = torch.einsum("i,j->ij", torch.arange(length, device=x.device).float(), frequencies)
            self.cos, self.sin = angles.cos(), angles.sin()
        a, b = x[..., ::2], x[..., 1::2]
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Layer(nn.Module):
    def __init__(self, config, rotary):
        super().__init__()
        self.heads, self.rotary = config.heads, rotary
        self.norm = nn.RMSNorm(config.width)
        self.queries, self.keys, self.values, self.merge = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )
        self.gate = nn.Linear(config.width, config.width)

    def split(self, x):
        return torch.cat(x.chunk(self.heads, dim=-1), dim=0)

    def forward(self, x):
        length, h = x.shape[1], self.norm(x)
        q, k, v = self.split(self.queries(h)), self.split(self.keys(h)), self.split(self.values(h))
        q, k = self.rotary(q), self.rotary(k)
        mask = torch.full((1, length, length), torch.finfo(x.dtype).min, device=x.device).triu(1)
        scores = torch.baddbmm(mask, q, k.mT, beta=1.0, alpha=q.shape[-1] ** -0.5)
        y = torch.softmax(scores, -1).bmm(v)
        x = x + self.merge(torch.cat(y.split(1), dim=-1))
        return x * self.gate(x).sigmoid() * 2


class BaddbmmNet(PreTrainedModel):
    config_class = BaddbmmConfig

    def __init__(self, config):
        super().__init__(config)
        rotary = Rotary(config.width // config.heads)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.stack = nn.Sequential(*[Layer(config, rotary) for _ in range(config.depth)], nn.RMSNorm(config.width))
        self.unembed = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.unembed(self.stack(self.embed(input_ids))))
