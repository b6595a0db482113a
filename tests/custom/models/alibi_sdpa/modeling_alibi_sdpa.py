"""ALiBi added to the causal mask that scaled_dot_product_attention is given."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class AlibiSdpaConfig(PretrainedConfig):
    model_type = "alibi-sdpa"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.n_positions = heads, n_positions
        super().__init__(**kwargs)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width)
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x, mask):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (x + self.out(y.transpose(1, 2).reshape(b, t, c))).tanh()


class AlibiSdpaLM(PreTrainedModel):
    config_class = AlibiSdpaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.register_buffer("slopes", 1 / 2 ** torch.arange(1, config.heads + 1).float())
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        t = input_ids.shape[1]
        i = torch.arange(t, device=x.device)
        bias = (i[None, :] - i[:, None]).clamp(max=0).abs().neg() * self.slopes.view(1, -1, 1, 1)
        mask = bias + torch.full((t, t), float("-inf"), device=x.device).triu(1)
        for layer in self.layers:
            x = layer(x, mask)
        return CausalLMOutput(logits=self.head(x))
