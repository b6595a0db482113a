"""scaled_dot_product_attention with an additive mask; a table of sinusoids sliced to the prompt; QKV in one, split."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class SinusoidConfig(PretrainedConfig):
    model_type = "float-mask-sinusoid"

    def __init__(self, vocab_size=128, d_model=64, num_layers=2, num_heads=2, max_position_embeddings=256, **kwargs):
        self.vocab_size, self.d_model, self.num_layers = vocab_size, d_model, num_layers
        self.num_heads, self.max_position_embeddings = num_heads, max_position_embeddings
        super().__init__(**kwargs)


class PositionalEncoding(nn.Module):
    """As in PyTorch's tutorial."""

    def __init__(self, d_model, max_len):
        super().__init__()
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, d_model)
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, x):
        return x + self.pe[: x.size(1)]


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.d_model, self.num_heads = config.d_model, config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.in_proj = nn.Linear(config.d_model, 3 * config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.fc1 = nn.Linear(config.d_model, 2 * config.d_model)
        self.fc2 = nn.Linear(2 * config.d_model, config.d_model)

    def forward(self, x, mask):
        batch, length, _ = x.shape
        q, k, v = self.in_proj(self.norm1(x)).split(self.d_model, dim=2)
        q, k, v = (y.view(batch, length, self.num_heads, -1).permute(0, 2, 1, 3) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        x = x + self.out_proj(y.permute(0, 2, 1, 3).flatten(2))
        return x + self.fc2(F.relu(self.fc1(self.norm2(x))))


class SinusoidLM(PreTrainedModel):
    config_class = SinusoidConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = PositionalEncoding(config.d_model, config.max_position_embeddings)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.decoder = nn.Linear(config.d_model, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        length = input_ids.shape[1]
        mask = torch.triu(torch.full((length, length), float("-inf"), device=input_ids.device), diagonal=1)
        x = self.positions(self.embed(input_ids))
        for layer in self.layers:
            x = layer(x, mask)
        return CausalLMOutput(logits=self.decoder(x))
