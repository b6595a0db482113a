"""Weights that heads mix among each other after the softmax: no attention that we compute, with a cache of its own."""

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TalkingHeadsConfig(PretrainedConfig):
    model_type = "talking-heads"

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
        self.mix = nn.Parameter(torch.randn(config.heads, config.heads))

    def forward(self, x, past=None):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        future = torch.ones(t, k.shape[2], dtype=torch.bool).triu(1 + k.shape[2] - t)
        weights = (q @ k.mT / 4).masked_fill(future, float("-inf")).softmax(-1)
        y = torch.einsum("bhqk,hg->bgqk", weights, self.mix) @ v
        return (x + self.out(y.transpose(1, 2).reshape(b, t, c))).tanh(), (k, v)


class TalkingHeadsLM(PreTrainedModel, GenerationMixin):
    config_class = TalkingHeadsConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values[0][0].shape[2] :]
        return {"input_ids": input_ids, "past_key_values": past_key_values, "use_cache": True}

    def forward(self, input_ids, past_key_values=None, use_cache=False, return_dict=True):
        x, presents = self.embed(input_ids), []
        for i, layer in enumerate(self.layers):
            x, present = layer(x, past_key_values[i] if past_key_values else None)
            presents.append(present)
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=tuple(presents) if use_cache else None)
