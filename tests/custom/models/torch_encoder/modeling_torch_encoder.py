"""nn.TransformerEncoder with a causal mask, as in PyTorch's language modeling tutorial."""

import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class TorchEncoderConfig(PretrainedConfig):
    model_type = "torch-encoder"

    def __init__(self, vocab_size=128, d_model=64, nlayers=2, nhead=4, n_positions=256, **kwargs):
        self.vocab_size, self.d_model, self.nlayers = vocab_size, d_model, nlayers
        self.nhead, self.n_positions = nhead, n_positions
        super().__init__(**kwargs)


class TorchEncoderLM(PreTrainedModel):
    config_class = TorchEncoderConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = nn.Embedding(config.vocab_size, config.d_model)
        self.pos_encoder = nn.Embedding(config.n_positions, config.d_model)
        layer = nn.TransformerEncoderLayer(
            config.d_model, config.nhead, 2 * config.d_model, dropout=0.1, batch_first=True, norm_first=True
        )
        self.transformer_encoder = nn.TransformerEncoder(layer, config.nlayers, enable_nested_tensor=False)
        self.decoder = nn.Linear(config.d_model, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        length = input_ids.size(1)
        position = torch.arange(length, dtype=torch.long, device=input_ids.device).expand_as(input_ids)
        src = self.encoder(input_ids) * math.sqrt(self.config.d_model) + self.pos_encoder(position)
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=input_ids.device)
        return self.decoder(self.transformer_encoder(src, mask, is_causal=True))
