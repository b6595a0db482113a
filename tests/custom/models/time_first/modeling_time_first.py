"""Tokens before the batch, as in fairseq: [T, B, C]; positions by a running sum over what is no padding."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class TimeFirstConfig(PretrainedConfig):
    model_type = "time-first"

    def __init__(self, vocab_size=128, width=64, depth=2, heads=4, n_positions=256, **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.heads, self.n_positions = heads, n_positions
        super().__init__(**kwargs)


PAD = 1


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dim = config.heads, config.width // config.heads
        self.q, self.k, self.v, self.out = (nn.Linear(config.width, config.width) for _ in range(4))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x, mask):
        length, batch, width = x.size()

        def by_head(y):
            return y.contiguous().view(-1, batch * self.heads, self.dim).transpose(0, 1)

        q = self.q(x)
        q *= self.dim**-0.5
        scores = torch.bmm(by_head(q), by_head(self.k(x)).transpose(1, 2))
        scores += mask.unsqueeze(0)
        weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores), 0.1, self.training)
        y = torch.bmm(weights, by_head(self.v(x))).transpose(0, 1).contiguous().view(length, batch, width)
        return self.norm(x + self.out(y))


class TimeFirstLM(PreTrainedModel):
    config_class = TimeFirstConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width, PAD)
        self.positions = nn.Embedding(config.n_positions + PAD + 1, config.width, PAD)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._future = torch.empty(0)
        self.post_init()

    def future(self, x):
        if self._future.size(0) < x.size(0):
            self._future = torch.triu(torch.full((x.size(0), x.size(0)), float("-inf")), 1)
        return self._future[: x.size(0), : x.size(0)]

    def forward(self, input_ids, **kwargs):
        is_token = input_ids.ne(PAD).int()
        positions = (torch.cumsum(is_token, dim=1).type_as(is_token) * is_token).long() + PAD
        x = (self.embed(input_ids) * 2.0 + self.positions(positions)).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, self.future(x))
        return CausalLMOutput(logits=self.head(x.transpose(0, 1)))
