"""Attention in einsums over [B, T, H, D]; float32 softmax, cast back; torch.where with the least number there is."""

import torch
from torch import einsum, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class EinsumConfig(PretrainedConfig):
    model_type = "einsum-net"

    def __init__(self, vocab_size=128, d_model=64, n_layers=2, n_heads=4, max_seq_len=256, **kwargs):
        self.vocab_size, self.d_model, self.n_layers = vocab_size, d_model, n_layers
        self.n_heads, self.max_seq_len = n_heads, max_seq_len
        super().__init__(**kwargs)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.d_model // config.n_heads
        self.w_qkv = nn.Parameter(torch.randn(3, config.d_model, config.n_heads, self.d_head))
        self.w_o = nn.Parameter(torch.randn(config.n_heads, self.d_head, config.d_model))

    def forward(self, x):
        q, k, v = einsum("btc,nchd->nbthd", x, self.w_qkv)
        scores = einsum("bqhd,bkhd->bhqk", q, k) / self.d_head**0.5
        i = torch.arange(x.shape[1], device=x.device)
        causal = i[None, :] <= i[:, None]
        scores = torch.where(causal, scores, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores.float(), dim=-1).type_as(x)
        return einsum("bthd,hdc->btc", einsum("bhqk,bkhd->bqhd", weights, v), self.w_o)


class EinsumNet(PreTrainedModel):
    config_class = EinsumConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Parameter(torch.randn(config.vocab_size, config.d_model))
        self.pos_embed = nn.Parameter(torch.randn(config.max_seq_len, config.d_model))
        self.attentions = nn.ModuleList(Attention(config) for _ in range(config.n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(config.n_layers))
        self.unembed = nn.Parameter(torch.randn(config.d_model, config.vocab_size))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed[input_ids] + self.pos_embed[torch.arange(input_ids.shape[-1], device=input_ids.device)]
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return CausalLMOutput(logits=x @ self.unembed)
