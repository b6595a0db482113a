"""Before serving: does the served model give the logits of the model as its author wrote it?

Two short random sequences run through the module's own plain forward pass, one by one, and through ours, together in
two steps (a part of the prompts, then the rest; or whole prompts, then a decode). What the module assumes silently,
such as positions counted by itself, a mask of its own, layers that mix tokens of a batch, or a cache that is not what
the plain pass computes, shows here instead of in a user's text.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor, nn

from shardwright.adapt.logits import own_logits
from shardwright.errors import UnsupportedModelError
from shardwright.worker.step import Ints, StepModel, StepTables

logger = logging.getLogger(__name__)

LENGTHS = (9, 6)
FIRST_STEP = (5, 5)

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Root mean square of the differences between logits, against the logits' standard deviation. Half-precision types
differ by the order of rounding alone (0.05 was seen in bfloat16 over 30 layers); a wrong position or mask shows as 1 or
so."""


@torch.inference_mode()
def plain_logits(module: nn.Module, *, vocab_size: int) -> Tensor:
    """Logits of the check's sequences, one after another, by the module's own forward pass: [sum(LENGTHS), vocab].

    Raises: UnsupportedModelError if it fails.
    """
    device = next(module.parameters()).device
    sequences = [torch.from_numpy(tokens)[None].to(device) for tokens in _sequences(vocab_size)]
    try:
        logits = torch.cat([own_logits(module, tokens).float() for tokens in sequences])
    except UnsupportedModelError:
        raise
    except Exception as exc:
        raise UnsupportedModelError(f"its forward pass fails: {type(exc).__name__}: {exc}") from exc
    if logits.shape[1] < vocab_size:
        raise UnsupportedModelError(
            f"its forward returns {logits.shape[1]:,} numbers for a token, but its config has a vocabulary of "
            f"{vocab_size:,}: are these the logits?"
        )
    return logits


@torch.inference_mode()
def check_logits(model: StepModel, expected: Tensor, *, vocab_size: int, block_size: int, dtype: torch.dtype) -> float:
    """Compare a model, without a cache yet, with the module's own logits.

    Args:
        model: to check; it gets a small cache, to be replaced afterwards.
        expected: from `plain_logits`.
        vocab_size, block_size: of the engine.
        dtype: of the model's weights.

    Returns: root mean square of the differences between logits, relative to the logits' standard deviation.
    Raises: UnsupportedModelError if it is over the tolerance of the dtype, or a step fails.
    """
    sequences = _sequences(vocab_size)
    ends = list(LENGTHS)
    steps = [list(FIRST_STEP), ends] if model.takes_chunks else [[end - 1 for end in ends], ends]
    try:
        actual = _stepwise_logits(model, sequences, steps, block_size)
    except UnsupportedModelError:
        raise
    except Exception as exc:
        raise UnsupportedModelError(f"its code fails in a step of two requests: {type(exc).__name__}: {exc}") from exc
    difference = float((expected - actual).square().mean().sqrt() / expected.std().clamp_min(1e-6))
    logger.debug("%s: logits differ by %.2g of their spread from the module's own", model.rung, difference)
    if not difference <= TOLERANCE[dtype]:
        raise UnsupportedModelError(
            f"logits differ from those of its own forward pass by {difference:.2g} of their spread, in {dtype}"
        )
    return difference


@torch.inference_mode()
def run_largest_step(model: StepModel, *, num_tokens: int, max_model_len: int, block_size: int) -> None:
    """Run `num_tokens` tokens of fresh prompts, so that the device's peak memory can be read off afterwards."""
    lengths = [max_model_len] * (num_tokens // max_model_len) + [num_tokens % max_model_len]
    sequences: list[Ints] = [np.zeros(length, dtype=np.int64) for length in lengths if length]
    _stepwise_logits(model, sequences, [[len(s) for s in sequences]], block_size, last_only=True)


def _sequences(vocab_size: int) -> list[Ints]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, length) for length in LENGTHS]


def _stepwise_logits(
    model: StepModel, sequences: list[Ints], steps: list[list[int]], block_size: int, *, last_only: bool = False
) -> Tensor:
    """Logits of all sequences, one after another, computed together in steps up to the lengths that `steps` gives."""
    num_rows, longest = len(sequences), max(map(len, sequences))
    blocks_per_row = -(-longest // block_size)
    table = np.arange(num_rows * blocks_per_row, 0, -1, dtype=np.int32).reshape(num_rows, blocks_per_row)
    model.allocate(num_rows=num_rows, num_blocks=table.size * len(model.groups), block_size=block_size)
    token_rows = np.zeros((num_rows, longest), dtype=np.int32)
    for row, tokens in enumerate(sequences):
        token_rows[row, : len(tokens)] = tokens
    pieces: list[list[Tensor]] = [[] for _ in sequences]
    starts = np.zeros(num_rows, dtype=np.int64)
    for lengths in steps:
        ends = np.array(lengths, dtype=np.int64)
        counts = ends - starts
        step = StepTables(
            token_rows=token_rows,
            block_tables=[table + group * table.size for group in range(len(model.groups))],  # groups share lanes
            rows=np.arange(num_rows),
            num_computed=starts,
            num_tokens=counts,
            logits_rows=np.cumsum(counts) - 1 if last_only else np.arange(counts.sum()),
        )
        logits = model.compute(step).float()
        for row, piece in enumerate(logits.split([1] * num_rows if last_only else counts.tolist())):
            pieces[row].append(piece)
        starts = ends
    model.release(list(range(num_rows)))
    return torch.cat([torch.cat(row) for row in pieces])
