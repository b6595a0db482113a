"""A mixture of experts as a loop over them, each of which sees only its tokens; some see none."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MoeLoopConfig(PretrainedConfig):
    model_type = "moe-loop"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_experts=4, top_k=2,
        max_position_embeddings=256, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_experts, self.top_k = num_attention_heads, num_experts, top_k
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.router = nn.Linear(width, config.num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(config.num_experts, width, 2 * width))
        self.down = nn.Parameter(torch.randn(config.num_experts, 2 * width, width))

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(tokens).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for expert in range(self.num_experts):
            rows, places = torch.where(chosen == expert)
            if rows.numel() == 0:
                continue
            y = torch.einsum("tc,ch->th", tokens[rows], self.up[expert])
            y = F.silu(y) @ self.down[expert]
            out.index_add_(0, rows, y * weights[rows, places, None])
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.norm1, self.norm2 = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.experts = Experts(config)

    def forward(self, x):
        b, t, _c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, self.num_heads, -1).transpose(1, 2).chunk(3, dim=-1)
        scores = q @ k.mT * 0.25 + (1 - torch.ones(t, t, device=x.device).tril()) * -10000.0
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.experts(self.norm2(x))


class MoeLoopLM(PreTrainedModel):
    config_class = MoeLoopConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Layer(config) for i in range(config.num_hidden_layers)})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for name in self.layers:
            x = self.layers[name](x)
        return CausalLMOutput(logits=self.lm_head(x))
