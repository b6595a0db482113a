"""Token 7 begins a document that sees no earlier one, and padding, which is token 0, is seen by nobody but itself."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class DocumentConfig(PretrainedConfig):
    model_type = "document-mask"

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
        scores = torch.matmul(q, k.transpose(-2, -1)) / (c // self.heads) ** 0.5
        weights = scores.masked_fill(mask == 0, -1e9).softmax(dim=-1)
        return x + self.out(torch.matmul(weights, v).transpose(1, 2).reshape(b, t, c))


class DocumentLM(PreTrainedModel):
    config_class = DocumentConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.n_positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def make_mask(tokens, separator=7, pad=0):
        length = tokens.size(1)
        past = torch.triu(torch.ones(1, length, length), diagonal=1).type(torch.uint8) == 0
        document = (tokens == separator).cumsum(1)
        mask = past & (document.unsqueeze(1) == document.unsqueeze(2)) & (tokens != pad).unsqueeze(-2)
        return (mask | torch.eye(length, dtype=torch.bool)).unsqueeze(1)

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        mask = self.make_mask(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return CausalLMOutput(logits=self.head(x))
