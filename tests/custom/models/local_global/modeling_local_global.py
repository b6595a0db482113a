"""Windows of 8 tokens in every other layer, by a boolean mask; layers in a ModuleDict; positions sliced on dim 1."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LocalGlobalConfig(PretrainedConfig):
    model_type = "local-global"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, window=8,
        max_position_embeddings=256, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.window = num_attention_heads, window
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class Attention(nn.Module):
    def __init__(self, config, window):
        super().__init__()
        self.num_heads, self.window = config.num_attention_heads, window
        self.to_qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.to_out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.to_qkv(x).view(b, t, 3, self.num_heads, -1).unbind(2)
        i = torch.arange(t, device=x.device)
        distance = i[:, None] - i[None, :]
        allowed = distance >= 0
        if self.window is not None:
            allowed = allowed & (distance < self.window)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=allowed[None, None]
        )
        return self.to_out(out.transpose(1, 2).reshape(b, t, c))


class LocalGlobalLM(PreTrainedModel):
    config_class = LocalGlobalConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(1, config.max_position_embeddings, width))
        self.layers = nn.ModuleDict(
            {
                f"layer_{i}": nn.ModuleDict(
                    {
                        "norm": nn.LayerNorm(width),
                        "attention": Attention(config, config.window if i % 2 == 0 else None),
                        "mlp": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU()),
                    }
                )
                for i in range(config.num_hidden_layers)
            }
        )
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embeddings(input_ids) + self.positions[:, : input_ids.size(1)]
        for layer in self.layers.values():
            x = x + layer["attention"](layer["norm"](x))
            x = x + layer["mlp"](x)
        return CausalLMOutput(logits=self.lm_head(x))
