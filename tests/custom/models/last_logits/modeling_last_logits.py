"""As nanoGPT when it generates: without targets only the last token gets logits."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LastLogitsConfig(PretrainedConfig):
    model_type = "last-logits"

    def __init__(self, vocab_size=128, n_embd=64, n_layer=2, n_head=4, block_size=256, **kwargs):
        self.vocab_size, self.n_embd, self.n_layer = vocab_size, n_embd, n_layer
        self.n_head, self.block_size = n_head, block_size
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, 2 * config.n_embd)
        self.c_out = nn.Linear(2 * config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).chunk(3, 2))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class LastLogitsGPT(PreTrainedModel):
    config_class = LastLogitsConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, labels=None):
        pos = torch.arange(0, input_ids.size(1), device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if labels is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return CausalLMOutput(loss=loss, logits=logits)
        return CausalLMOutput(logits=self.lm_head(x[:, [-1], :]))
