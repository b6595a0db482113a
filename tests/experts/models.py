"""Small decoders around the blocks of `blocks.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from tests.experts import blocks
from tests.experts.blocks import WIDTH
from torch import Tensor, nn

VOCAB_SIZE = 64


class Layer(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 2, WIDTH // 2)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        mixed = self.block(self.norm2(x))
        return x + (mixed[0] if isinstance(mixed, tuple) else mixed)


class Decoder(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], *, num_positions: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCAB_SIZE, WIDTH), nn.Embedding(num_positions, WIDTH)
        self.layers = nn.ModuleList(Layer(block()) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_decoder(block: Callable[[], nn.Module], *, num_positions: int = 64) -> Decoder:
    """With weights that let tokens differ, for inference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder(block, num_positions=num_positions)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 1.0 if name.startswith("embed") else 1.3 / WIDTH**0.5)
    return model.eval().requires_grad_(False)


def factory(block: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, dict[str, object]]]:
    """A function that makes a decoder for an engine."""
    return lambda: (make_decoder(block), {"max_model_len": 64, "has_weights": True})


masks, capacity = factory(blocks.Masks), factory(blocks.Capacity)
