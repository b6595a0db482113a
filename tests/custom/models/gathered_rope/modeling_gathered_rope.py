"""Rotary tables sliced to the prompt and then gathered by position_ids, as in much code copied from early Llamas."""

import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class GatheredConfig(PretrainedConfig):
    model_type = "gathered-rope"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, max_position_embeddings
        super().__init__(**kwargs)


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, max_position_embeddings):
        super().__init__()
        inv_freq = 1.0 / (60 ** (torch.arange(0, dim, 2).float() / dim))
        freqs = torch.einsum("i,j->ij", torch.arange(max_position_embeddings).float(), inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        self.register_buffer("cos_cached", emb.cos()[None, None, :, :])
        self.register_buffer("sin_cached", emb.sin()[None, None, :, :])

    def forward(self, x, seq_len):
        return self.cos_cached[:, :, :seq_len, ...].to(x.dtype), self.sin_cached[:, :, :seq_len, ...].to(x.dtype)


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin, position_ids):
    cos, sin = cos.squeeze(1).squeeze(0), sin.squeeze(1).squeeze(0)
    cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )
        self.rotary_emb = RotaryEmbedding(self.head_dim, config.max_position_embeddings)

    def forward(self, hidden_states, attention_mask, position_ids):
        b, t, c = hidden_states.shape
        shape = (b, t, self.num_heads, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cos, sin = self.rotary_emb(v, seq_len=k.shape[-2])
        q, k = apply_rotary_pos_emb(q, k, cos, sin, position_ids)
        attn_weights = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        if attn_weights.size() != (b, self.num_heads, t, t):
            raise ValueError(f"Attention weights have size {attn_weights.size()}")
        attn_weights = attn_weights + attention_mask
        attn_weights = torch.max(attn_weights, torch.tensor(torch.finfo(attn_weights.dtype).min))
        attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.o_proj(torch.matmul(attn_weights, v).transpose(1, 2).contiguous().reshape(b, t, c))


class GatheredLM(PreTrainedModel):
    config_class = GatheredConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.attentions = nn.ModuleList([Attention(config) for _ in range(config.num_hidden_layers)])
        self.norms = nn.ModuleList([nn.RMSNorm(width) for _ in range(config.num_hidden_layers)])
        self.mlp = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, return_dict=None):
        batch_size, seq_length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(0, seq_length, dtype=torch.long, device=input_ids.device).unsqueeze(0)
        else:
            position_ids = position_ids.view(-1, seq_length).long()
        mask = torch.full((seq_length, seq_length), torch.finfo(torch.float32).min, device=input_ids.device)
        mask_cond = torch.arange(mask.size(-1), device=mask.device)
        mask.masked_fill_(mask_cond < (mask_cond + 1).view(mask.size(-1), 1), 0)
        mask = mask[None, None].expand(batch_size, 1, seq_length, seq_length)
        x = self.embed_tokens(input_ids)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), mask, position_ids)
            x = x + self.mlp(x)
        return CausalLMOutputWithPast(logits=self.lm_head(x))
