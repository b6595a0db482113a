"""Windows of 8 tokens in attention written out, every other layer; grouped queries by broadcasting; index
assignment.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class WindowedConfig(PretrainedConfig):
    model_type = "windowed-raw"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_layers=3, num_heads=4, window=8, max_position_embeddings=256,
        **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.num_heads, self.window, self.max_position_embeddings = num_heads, window, max_position_embeddings
        super().__init__(**kwargs)


class Layer(nn.Module):
    def __init__(self, config, window):
        super().__init__()
        self.num_heads, self.window = config.num_heads, window
        self.head_dim = config.hidden_size // config.num_heads
        self.norm = nn.LayerNorm(config.hidden_size)
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv = nn.Linear(config.hidden_size, 4 * self.head_dim)
        self.o = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlp = nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size), nn.Mish())

    def forward(self, x):
        b, t, c = x.shape
        h = self.norm(x)
        q = self.q(h).view(b, t, 2, self.num_heads // 2, self.head_dim).permute(0, 2, 3, 1, 4)
        k, v = self.kv(h).view(b, t, 2, 2, 1, self.head_dim).permute(2, 0, 3, 4, 1, 5)
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        hidden = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        if self.window:
            hidden = hidden | torch.ones_like(hidden).tril(-self.window)
        scores[..., hidden] = float("-inf")
        y = nn.Softmax(dim=-1)(scores) @ v
        x = x + self.o(y.permute(0, 3, 1, 2, 4).reshape(b, t, c))
        return x + self.mlp(x)


class WindowedLM(PreTrainedModel):
    config_class = WindowedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, config.window if i % 2 else None) for i in range(config.num_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.size(-1)).to(input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(x))
