"""flex_attention: a block mask for a window, and in every other layer a score_mod with a soft-cap and ALiBi."""

import torch
from torch import nn
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class FlexConfig(PretrainedConfig):
    model_type = "flex-scores"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, kv_heads=2, window=11, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth, self.window = vocab_size, width, depth, window
        self.heads, self.kv_heads, self.n_positions = heads, kv_heads, n_positions
        super().__init__(**kwargs)


def causal(batch, head, query, key):
    return query >= key


class Layer(nn.Module):
    def __init__(self, config, has_window):
        super().__init__()
        self.heads, self.kv_heads, self.has_window = config.heads, config.kv_heads, has_window
        dim = config.width // config.heads
        self.norm = nn.LayerNorm(config.width)
        self.q, self.out = nn.Linear(config.width, config.width), nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.kv_heads * dim)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, config.heads + 1))

    def score_mod(self, score, batch, head, query, key):
        score = 20.0 * torch.tanh(score / 20.0) - self.slopes[head] * (query - key)
        return torch.where(query >= key, score, -float("inf"))

    def forward(self, x, window):
        b, t, c = x.shape
        y = self.norm(x)
        q = self.q(y).view(b, t, self.heads, -1).transpose(1, 2)
        k, v = self.kv(y).view(b, t, 2, self.kv_heads, -1).permute(2, 0, 3, 1, 4)
        options = {"block_mask": window} if self.has_window else {"score_mod": self.score_mod}
        y = flex_attention(q, k, v, enable_gqa=True, **options)
        return x + self.out(y.transpose(1, 2).reshape(b, t, c))


class FlexLM(PreTrainedModel):
    config_class = FlexConfig

    def __init__(self, config):
        super().__init__(config)
        self.window = config.window
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.n_positions, config.width)
        self.layers = nn.ModuleList(Layer(config, i % 2 == 0) for i in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        t = input_ids.shape[1]
        mask = and_masks(causal, lambda batch, head, query, key: query - key < self.window)
        window = create_block_mask(mask, None, None, t, t, device=str(input_ids.device))
        x = self.embed(input_ids) + self.positions(torch.arange(t, device=input_ids.device))
        for layer in self.layers:
            x = layer(x, window)
        return CausalLMOutput(logits=self.head(x))
