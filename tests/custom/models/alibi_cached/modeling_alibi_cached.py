"""ALiBi with a cache of the author's own: a tuple of keys and values per layer."""

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class AlibiCachedConfig(PretrainedConfig):
    model_type = "alibi-cached"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, max_position_embeddings
        super().__init__(**kwargs)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.register_buffer("slopes", 0.5 ** torch.arange(1, config.num_attention_heads + 1).float())

    def forward(self, x, past=None):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        total = k.shape[2]
        distance = torch.arange(total - t, total)[:, None] - torch.arange(total)[None]
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 4 - self.slopes[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, float("-inf")).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, c)), (k, v)


class AlibiCachedLM(PreTrainedModel, GenerationMixin):
    config_class = AlibiCachedConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.attentions = nn.ModuleList(Attention(config) for _ in range(config.num_hidden_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.num_hidden_layers))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.head = nn.Linear(width, config.vocab_size, bias=False)
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
        for i, (norm, attention) in enumerate(zip(self.norms, self.attentions, strict=True)):
            y, present = attention(norm(x), past_key_values[i] if past_key_values else None)
            x = x + y
            x = x + self.mlp(x)
            presents.append(present)
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=tuple(presents) if use_cache else None)
