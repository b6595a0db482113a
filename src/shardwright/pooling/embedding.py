"""From the hidden states of a text's tokens to its embedding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shardwright.errors import CheckpointError, UnsupportedModelError
from shardwright.pooling.sentence_config import PoolingMode

ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.Sigmoid, nn.ReLU, nn.GELU, nn.SiLU)
}
"""Of dense layers, by the last part of their names in configs."""


def pool(hidden: Tensor, lengths: Tensor, mode: PoolingMode) -> Tensor:
    """One vector per text.

    Args:
        hidden: [B, L, hidden_size], float32; what lies at and after a text's length is ignored.
        lengths: [B], int64, at least 1.
        mode: which tokens count.

    Returns: [B, hidden_size].
    """
    if mode is PoolingMode.CLS:
        return hidden[:, 0]
    if mode is PoolingMode.LAST:
        return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    is_token = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return hidden.masked_fill(~is_token[..., None], 0.0).sum(1) / lengths[:, None]


class Normalize(nn.Module):
    """Scales vectors to length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, size] to [B, size]."""
        return nn.functional.normalize(vectors, dim=-1)


class Dense(nn.Module):
    """A linear layer and an activation, from a folder of sentence-transformers.

    Raises: CheckpointError if its weights cannot be read; UnsupportedModelError if it does something else, too.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors")
            self.size, in_features = weights["linear.weight"].shape
            self.linear = nn.Linear(in_features, self.size, bias="linear.bias" in weights).requires_grad_(False)
            self.load_state_dict(weights)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
            raise CheckpointError(f"the dense layer in {folder} cannot be read: {type(exc).__name__}: {exc}") from exc
        activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        kind = activation.rpartition(".")[2]
        if kind not in ACTIVATIONS or config.get("use_residual"):
            what = "adds its input" if config.get("use_residual") else f"uses {activation}"
            raise UnsupportedModelError(f"the dense layer in {folder} {what}, which is not served")
        self.activation = ACTIVATIONS[kind]()

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, in] to [B, size]."""
        activated: Tensor = self.activation(self.linear(vectors))
        return activated


class EmbeddingHead(nn.Module):
    """Pooling, then what the model's files put after it.

    Args:
        mode: of pooling.
        hidden_size: of the model.
        tail: dense layers and normalising, as SentenceConfig has it.
        normalize: whether embeddings end up with length 1; None: as the tail says.
    """

    def __init__(
        self, mode: PoolingMode, hidden_size: int, tail: Sequence[tuple[str, Path]], *, normalize: bool | None
    ) -> None:
        super().__init__()
        self.mode = mode
        layers = [Normalize() if kind == "Normalize" else Dense(folder) for kind, folder in tail]
        if normalize is not None:
            layers = [layer for layer in layers if isinstance(layer, Dense)] + [Normalize()] * normalize
        self.tail = nn.Sequential(*layers)
        self.normalizes = bool(layers) and isinstance(layers[-1], Normalize)
        self.size = next((layer.size for layer in reversed(layers) if isinstance(layer, Dense)), hidden_size)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """[B, L, hidden_size] and [B] to [B, size], float32."""
        embedded: Tensor = self.tail(pool(hidden.float(), lengths, self.mode))
        return embedded
