"""What is found out about a module by running it: whether it looks ahead, and which texts it may be given together."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from shardwright.engine.messages import PoolingRequest
from shardwright.errors import UnsupportedModelError
from shardwright.foreign_errors import described
from shardwright.pooling.batching import Batching
from shardwright.pooling.model import PoolingModel, padded_inputs

logger = logging.getLogger(__name__)

LENGTHS = (9, 4, 9)
"""Of the texts of a check; two are alike in length."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Root mean square of the differences, against that of the values themselves."""


@torch.inference_mode()
def read_ahead(module: PreTrainedModel, *, vocab_size: int) -> tuple[int, bool]:
    """Size of a token's hidden state, and whether it depends on tokens that come later, as in an encoder.

    Raises: UnsupportedModelError if the module cannot read a text, or gives no hidden states.
    """
    text = _texts(module.config, vocab_size)[0].prompt_token_ids
    other = [*text[:-1], (text[-1] + 1) % vocab_size]
    requests = [PoolingRequest(request_id="", prompt_token_ids=token_ids) for token_ids in (text, other)]
    try:
        inputs = [padded_inputs([request], module.config, module.device)[0] for request in requests]
        first, second = (module(**one).last_hidden_state[0, :-1] for one in inputs)
    except Exception as exc:  # the module's code may fail in any way
        raise UnsupportedModelError(f"its forward pass fails: {described(exc)}") from exc
    return first.shape[-1], _difference(first, second) > TOLERANCE[first.dtype]


def choose_batching(model: PoolingModel, *, vocab_size: int) -> Batching:
    """The best way of giving texts together that changes nothing about what becomes of each.

    Raises: UnsupportedModelError if the model cannot even read a single text.
    """
    texts = _texts(model.module.config, vocab_size)
    try:
        alone = torch.cat([model.compute([text]) for text in texts])
    except Exception as exc:
        raise UnsupportedModelError(f"its forward pass fails: {described(exc)}") from exc
    for batching, chosen in ((Batching.PADDED, [0, 1, 2]), (Batching.EQUAL, [0, 2])):
        try:
            difference = _difference(alone[chosen], model.compute([texts[i] for i in chosen]))
            reason = f"results differ by {difference:.2g}"
        except Exception as exc:
            difference, reason = float("inf"), described(exc)
        if difference <= TOLERANCE[model.module.dtype]:
            return batching
        logger.warning("texts are not read together %s: %s", batching, reason)
    return Batching.ALONE


def _texts(config: PretrainedConfig, vocab_size: int) -> list[PoolingRequest]:
    """Random texts without padding tokens, which mean something of their own, ended as the model knows it."""
    text_config = config.get_text_config()
    pad, ends = getattr(text_config, "pad_token_id", None), getattr(text_config, "eos_token_id", None)
    end = ends[0] if isinstance(ends, list) else ends
    ended = [end] if isinstance(end, int) and end < vocab_size else []
    allowed = np.array([token for token in range(min(vocab_size, 4096)) if token not in (pad, end)])
    generator = np.random.default_rng(0)
    texts = [generator.choice(allowed, length).tolist() + ended for length in LENGTHS]
    return [PoolingRequest(request_id="", prompt_token_ids=text) for text in texts]


def _difference(expected: Tensor, actual: Tensor) -> float:
    expected, actual = expected.float(), actual.float()
    return float(((expected - actual).square().mean() / expected.square().mean().clamp_min(1e-12)).sqrt())
