"""A module that reads whole texts, several at once, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from shardwright.engine.messages import PoolingRequest
from shardwright.pooling.embedding import EmbeddingHead


class PoolingModel:
    """Texts in, one vector each out.

    Args:
        module: weights loaded, on its device.
        head: makes embeddings of hidden states; None: the module is a classifier, whose logits are the result.
    """

    def __init__(self, module: PreTrainedModel, head: EmbeddingHead | None) -> None:
        self.module = module
        self.head = head

    @torch.inference_mode()
    def compute(self, requests: Sequence[PoolingRequest]) -> Tensor:
        """Read texts. Returns [B, size], float32, on the CPU."""
        inputs, lengths = padded_inputs(requests, self.module.config, self.module.device)
        output = self.module(**inputs)
        result: Tensor = output.logits.float() if self.head is None else self.head(output.last_hidden_state, lengths)
        return result.cpu()


def padded_inputs(
    requests: Sequence[PoolingRequest], config: PretrainedConfig, device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """Keyword arguments of a forward pass, and lengths [B].

    The padding token matters even behind a mask: some code counts positions, or finds the last token, by it.
    """
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    pad = pad if isinstance(pad, int) and pad >= 0 else 0
    rows = [request.prompt_token_ids for request in requests]
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    inputs = {
        "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }
    if any(request.token_type_ids for request in requests):
        types = [request.token_type_ids or [0] * len(request.prompt_token_ids) for request in requests]
        inputs["token_type_ids"] = torch.tensor([row + [0] * (longest - len(row)) for row in types])
    return {name: tensor.to(device) for name, tensor in inputs.items()}, lengths.to(device)
