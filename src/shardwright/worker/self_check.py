"""Before serving: does the adapted model give the logits of the model as its author wrote it?

Two short random sequences run through Hugging Face's own eager attention, one by one, and through ours, packed together
in two steps (a prompt chunk each, then another chunk and a decode). What the module assumes silently, such as positions
counted by itself, a mask of its own, or layers that mix tokens of a batch, shows here instead of in a user's text.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardwright.adapt.dispatch import SERVE
from shardwright.adapt.probe import set_attention
from shardwright.adapt.served_model import ServedModel
from shardwright.attention.kv_cache import KVCache
from shardwright.attention.layout import AttentionBackend
from shardwright.errors import UnsupportedModelError
from shardwright.worker.inputs import build_inputs

logger = logging.getLogger(__name__)

LENGTHS = (9, 6)
FIRST_CHUNKS = (5, 5)

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Root mean square of the differences between logits, against the logits' standard deviation. Half-precision types
differ by the order of rounding alone (0.05 was seen in bfloat16 over 30 layers); a wrong position or mask shows as 1 or
so."""


@torch.inference_mode()
def check_against_eager(
    served: ServedModel, backend: AttentionBackend, *, vocab_size: int, dtype: torch.dtype
) -> float:
    """Compare both ways of running the model.

    Returns: root mean square of the differences between logits, relative to the logits' standard deviation.
    Raises: UnsupportedModelError if it is over the tolerance of the dtype.
    """
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, vocab_size, length) for length in LENGTHS]
    device = next(served.module.parameters()).device
    expected = _eager_logits(served, sequences, device)
    steps = [np.array(FIRST_CHUNKS), np.array(LENGTHS)]
    try:
        actual = _packed_logits(served, backend, sequences, steps, dtype, device)
    except Exception as exc:
        raise UnsupportedModelError(
            f"its code fails when requests are packed together: {type(exc).__name__}: {exc}"
        ) from exc
    difference = float((expected - actual).square().mean().sqrt() / expected.std().clamp_min(1e-6))
    logger.debug("packed and eager logits differ by %.2g of their spread", difference)
    if not difference <= TOLERANCE[dtype]:
        raise UnsupportedModelError(
            f"its logits change when requests are packed together (by {difference:.2g} of their spread, in {dtype}): "
            "its code depends on something besides input_ids, position_ids and the attention interface"
        )
    return difference


def _eager_logits(served: ServedModel, sequences: list[np.ndarray], device: torch.device) -> Tensor:
    set_attention(served.module, "eager")
    try:
        outputs: list[Any] = [
            served.module(input_ids=torch.from_numpy(tokens)[None].to(device), use_cache=False) for tokens in sequences
        ]
    finally:
        set_attention(served.module, SERVE)
    return torch.cat([output.logits[0].float() for output in outputs])


@torch.inference_mode()
def run_largest_step(
    served: ServedModel, backend: AttentionBackend, *, num_tokens: int, max_model_len: int, dtype: torch.dtype
) -> None:
    """Run a step of `num_tokens` tokens of fresh prompts, so that the device's peak memory can be read off
    afterwards.
    """
    lengths = [max_model_len] * (num_tokens // max_model_len) + [num_tokens % max_model_len]
    sequences = [np.zeros(length, dtype=np.int64) for length in lengths if length]
    device = next(served.module.parameters()).device
    _packed_logits(served, backend, sequences, [np.array([len(s) for s in sequences])], dtype, device, last_only=True)


def _packed_logits(
    served: ServedModel,
    backend: AttentionBackend,
    sequences: list[np.ndarray],
    steps: list[np.ndarray],
    dtype: torch.dtype,
    device: torch.device,
    *,
    last_only: bool = False,
) -> Tensor:
    """Logits of all sequences, one after another, computed together in steps up to the lengths that `steps` gives."""
    block_size, num_rows = backend.block_size, len(sequences)
    longest = max(map(len, sequences))
    blocks_per_row = -(-longest // block_size)
    table = np.arange(num_rows * blocks_per_row, 0, -1, dtype=np.int32).reshape(num_rows, blocks_per_row)
    # Groups share lanes, so each has blocks of its own.
    tables = [table + group * table.size for group in range(len(served.groups))]
    cache = KVCache(
        served.layers,
        served.groups,
        num_blocks=table.size * len(served.groups),
        block_size=block_size,
        dtype=dtype,
        device=device,
    )
    token_rows = np.zeros((num_rows, longest), dtype=np.int32)
    for row, tokens in enumerate(sequences):
        token_rows[row, : len(tokens)] = tokens
    pieces: list[list[Tensor]] = [[] for _ in sequences]
    starts = np.zeros(num_rows, dtype=np.int64)
    for ends in steps:
        counts = ends - starts
        inputs = build_inputs(
            token_rows=token_rows,
            block_tables=tables,
            rows=np.arange(num_rows),
            num_computed=starts,
            num_tokens=counts,
            logits_rows=np.cumsum(counts) - 1 if last_only else np.arange(counts.sum()),
            groups=served.groups,
            block_size=block_size,
            backend=backend,
            device=device,
        )
        logits = served.forward(inputs, cache, backend).float()
        for row, piece in enumerate(logits.split([1] * num_rows if last_only else counts.tolist())):
            pieces[row].append(piece)
        starts = ends
    return torch.cat([torch.cat(row) for row in pieces])
