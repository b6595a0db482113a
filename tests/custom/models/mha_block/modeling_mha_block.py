"""nn.MultiheadAttention without weights; position ids kept in a buffer and sliced on dim 1."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MhaConfig(PretrainedConfig):
    model_type = "mha-block"

    def __init__(self, vocab_size=128, embed_dim=64, num_layers=2, num_heads=4, max_position_embeddings=256, **kwargs):
        self.vocab_size, self.embed_dim, self.num_layers = vocab_size, embed_dim, num_layers
        self.num_heads, self.max_position_embeddings = num_heads, max_position_embeddings
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.embed_dim), nn.LayerNorm(config.embed_dim)
        self.attn = nn.MultiheadAttention(config.embed_dim, config.num_heads, batch_first=True)
        self.ff = nn.Sequential(
            nn.Linear(config.embed_dim, 2 * config.embed_dim),
            nn.ReLU(),
            nn.Linear(2 * config.embed_dim, config.embed_dim),
        )

    def forward(self, x, causal_mask):
        h = self.norm1(x)
        attn_out, _ = self.attn(h, h, h, attn_mask=causal_mask, need_weights=False)
        x = x + attn_out
        return x + self.ff(self.norm2(x))


class MhaLM(PreTrainedModel):
    config_class = MhaConfig

    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.embed_dim)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings).expand((1, -1)))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.head = nn.Linear(config.embed_dim, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        t = input_ids.shape[1]
        x = self.word_embeddings(input_ids) + self.position_embeddings(self.position_ids[:, :t])
        causal_mask = torch.triu(torch.ones(t, t, device=x.device, dtype=torch.bool), diagonal=1)
        for block in self.blocks:
            x = block(x, causal_mask)
        return CausalLMOutput(logits=self.head(x))
