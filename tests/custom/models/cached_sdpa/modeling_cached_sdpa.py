"""Code with Transformers' cache that calls scaled_dot_product_attention itself: the cache is not needed to serve it."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class CachedSdpaConfig(PretrainedConfig):
    model_type = "cached-sdpa"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.hidden_size // config.num_attention_heads
        kv_width = config.num_key_value_heads * self.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj, self.v_proj = nn.Linear(config.hidden_size, kv_width), nn.Linear(config.hidden_size, kv_width)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, past_key_values):
        b, t, c = x.shape
        q, k, v = (
            proj(x).view(b, t, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        total = k.shape[2]
        mask = torch.ones(t, total, dtype=torch.bool, device=x.device).tril(total - t)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, c))


class CachedSdpaLM(PreTrainedModel, GenerationMixin):
    config_class = CachedSdpaConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.attentions = nn.ModuleList(Attention(config, i) for i in range(config.num_hidden_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=None, **kwargs):
        use_cache = use_cache if use_cache is not None else True
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(past_length, past_length + input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.positions(positions)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = (x + attention(norm(x), past_key_values)).tanh()
        return CausalLMOutputWithPast(logits=self.lm_head(x), past_key_values=past_key_values)
