"""Keys and values written into tensors of fixed length, from a start that the caller names, as in Llama's own code."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class StartConfig(PretrainedConfig):
    model_type = "start-position"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.n_positions = heads, n_positions
        super().__init__(**kwargs)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, dim = config.heads, config.width // config.heads
        self.wq, self.wo = nn.Linear(config.width, config.width), nn.Linear(config.width, config.width)
        self.wk, self.wv = nn.Linear(config.width, 2 * dim), nn.Linear(config.width, 2 * dim)
        self.register_buffer("cache_k", torch.zeros(1, config.n_positions, 2, dim))
        self.register_buffer("cache_v", torch.zeros(1, config.n_positions, 2, dim))

    def forward(self, x, start_pos, angles, mask):
        batch, length, width = x.shape

        def rotated(y):
            y = torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2)) * angles[None, :, None]
            return torch.view_as_real(y).flatten(3)

        q = rotated(self.wq(x).view(batch, length, self.heads, -1))
        self.cache_k[:batch, start_pos : start_pos + length] = rotated(self.wk(x).view(batch, length, 2, -1))
        self.cache_v[:batch, start_pos : start_pos + length] = self.wv(x).view(batch, length, 2, -1)
        k, v = self.cache_k[:batch, : start_pos + length], self.cache_v[:batch, : start_pos + length]
        k, v = (y.repeat_interleave(self.heads // 2, dim=2).transpose(1, 2) for y in (k, v))
        scores = torch.matmul(q.transpose(1, 2), k.transpose(2, 3)) / (width // self.heads) ** 0.5
        if mask is not None:
            scores = scores + mask
        y = torch.matmul(scores.float().softmax(-1).type_as(q), v)
        return self.wo(y.transpose(1, 2).contiguous().view(batch, length, -1))


class StartLM(PreTrainedModel):
    config_class = StartConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Attention(config) for _ in range(config.depth))
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        dim = config.width // config.heads
        angles = torch.outer(torch.arange(config.n_positions), 100.0 ** -(torch.arange(0, dim, 2) / dim))
        self.register_buffer("angles", torch.stack((angles.cos(), angles.sin()), dim=-1))
        self.post_init()

    def forward(self, input_ids, start_pos: int, **kwargs):
        length = input_ids.shape[1]
        x = self.embed(input_ids)
        angles = torch.view_as_complex(self.angles[start_pos : start_pos + length])
        mask = None
        if length > 1:
            mask = torch.triu(torch.full((length, length), float("-inf")), diagonal=1)
            mask = torch.hstack([torch.zeros(length, start_pos), mask])
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), start_pos, angles, mask)
        return {"lm_logits": self.head(x), "mask": mask}
