"""Keys and values made of a latent by parameters of their own, in einsum; the part of the keys that heads share comes
first; attention written out by hand.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class PartsConfig(PretrainedConfig):
    model_type = "latent-parts"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, kv_rank=16,
        max_position_embeddings=256, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.kv_rank = num_attention_heads, kv_rank
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, heads, self.rank = config.hidden_size, config.num_attention_heads, config.kv_rank
        self.head_dim = width // heads
        self.norm, self.latent_norm = nn.RMSNorm(width), nn.RMSNorm(self.rank)
        self.down = nn.Linear(width, self.rank + self.head_dim, bias=False)
        self.query = nn.Parameter(torch.zeros(width, heads, 2 * self.head_dim))
        self.up_key = nn.Parameter(torch.zeros(self.rank, heads, self.head_dim))
        self.up_value = nn.Parameter(torch.zeros(heads, self.head_dim, self.rank))
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )  # fmt: skip

    def forward(self, x, cos, sin):
        h = self.norm(x)
        latent, shared = self.down(h).split([self.rank, self.head_dim], dim=-1)
        latent = self.latent_norm(latent) * 2.0
        turned, plain = torch.einsum("btc,chd->bthd", h, self.query).chunk(2, dim=-1)
        own = torch.einsum("btr,rhd->bthd", latent, self.up_key)
        shared = self.turn(shared[:, :, None], cos, sin).repeat(1, 1, own.shape[2], 1)
        q, k = torch.cat([self.turn(turned, cos, sin), plain], -1), torch.cat([shared, own], -1)
        v = torch.einsum("btr,hdr->bhtd", latent, self.up_value)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / k.shape[-1] ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y = torch.einsum("bhqk,bhkd->bqhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)
        x = x + self.out(y.flatten(2))
        return x + self.mlp(x)

    @staticmethod
    def turn(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class PartsLM(PreTrainedModel):
    config_class = PartsConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        half = config.hidden_size // config.num_attention_heads // 2
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), 30.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos()[None, :, None])
        self.register_buffer("sin", angles.sin()[None, :, None])
        self.post_init()

    def forward(self, input_ids, **kwargs):
        length = input_ids.shape[1]
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, self.cos[:, :length], self.sin[:, :length])
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))
