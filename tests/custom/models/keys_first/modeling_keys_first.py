"""Einsums that name the keys before the queries and the values before the weights; in-place masks; two T's a head."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class KeysFirstConfig(PretrainedConfig):
    model_type = "keys-first"

    def __init__(self, vocab_size=128, d_model=64, n_layers=2, n_heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.d_model, self.n_layers = vocab_size, d_model, n_layers
        self.n_heads, self.n_positions = n_heads, n_positions
        super().__init__(**kwargs)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.norm = nn.LayerNorm(config.d_model)
        self.kv = nn.Linear(config.d_model, 2 * config.d_model)
        self.q = nn.Linear(config.d_model, config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x):
        _b, t, c = x.shape
        h = self.norm(x)
        k, v = self.kv(h).unflatten(-1, (2, self.n_heads, -1)).unbind(2)
        q = self.q(h).unflatten(-1, (self.n_heads, -1)) / (c // self.n_heads) ** 0.5
        scores = torch.einsum("b k h d, b q h d -> b h q k", k, q)
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu_(1)
        scores.masked_fill_(future, -torch.inf)
        weights = scores.softmax(dim=-1)
        y = torch.einsum("b k h d, b h q k -> b q h d", v, weights)
        return torch.tanh(x + self.out(y.flatten(2)))


class KeysFirstNet(PreTrainedModel):
    config_class = KeysFirstConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.n_positions, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.wte(input_ids) + self.wpe(torch.arange(0, input_ids.shape[1], 1, device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(x))
