"""nn.MultiheadAttention that gives its weights, sequence first; layers in a Sequential; gives a bare tensor."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class MhaWeightsConfig(PretrainedConfig):
    model_type = "mha-weights"

    def __init__(self, vocab_size=128, embed_dim=64, num_layers=2, num_heads=2, max_position_embeddings=256, **kwargs):
        self.vocab_size, self.embed_dim, self.num_layers = vocab_size, embed_dim, num_layers
        self.num_heads, self.max_position_embeddings = num_heads, max_position_embeddings
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x):  # [T, B, C]
        mask = torch.full((len(x), len(x)), float("-inf"), device=x.device).triu(1)
        h = self.norm(x)
        attended, weights = self.attention(h, h, h, attn_mask=mask)
        assert weights.shape[-1] == len(x)
        x = x + attended
        return x + self.mlp(x)


class MhaWeightsLM(PreTrainedModel):
    config_class = MhaWeightsConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.places = nn.Embedding(config.max_position_embeddings, config.embed_dim)
        self.body = nn.Sequential(*(Block(config.embed_dim, config.num_heads) for _ in range(config.num_layers)))
        self.head = nn.Linear(config.embed_dim, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        return self.head(self.body(x.transpose(0, 1)).transpose(0, 1))
