"""The head, tied to the embeddings, sees all tokens in one dimension; its logits get back theirs afterwards."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class FlatHeadConfig(PretrainedConfig):
    model_type = "flat-head"

    def __init__(self, vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=256, **kwargs):
        self.vocab_size, self.n_embd, self.n_layer = vocab_size, n_embd, n_layer
        self.n_head, self.n_positions = n_head, n_positions
        super().__init__(**kwargs)


class Head(nn.Module):
    """One head of attention with its own projections, as in many a lecture."""

    def __init__(self, n_embd, head_size, n_positions):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(n_positions, n_positions)))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        _, T, _ = x.shape
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        wei = self.dropout(nn.functional.softmax(wei, dim=-1))
        return wei @ self.value(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        head_size = config.n_embd // config.n_head
        self.heads = nn.ModuleList([Head(config.n_embd, head_size, config.n_positions) for _ in range(config.n_head)])
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.ffwd = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd), nn.ReLU(), nn.Linear(4 * config.n_embd, config.n_embd)
        )
        self.ln1, self.ln2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)

    def forward(self, x):
        h = self.ln1(x)
        x = x + self.proj(torch.cat([head(h) for head in self.heads], dim=-1))
        return x + self.ffwd(self.ln2(x))


class FlatHeadGPT(PreTrainedModel):
    config_class = FlatHeadConfig

    def __init__(self, config):
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding_table = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding_table.weight
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.token_embedding_table(idx) + self.position_embedding_table(torch.arange(T, device=idx.device))
        x = self.ln_f(self.blocks(x))
        logits = self.lm_head(x.view(B * T, -1)).view(B, T, -1)
        loss = None if targets is None else nn.functional.cross_entropy(logits.view(B * T, -1), targets.view(B * T))
        return logits, loss
