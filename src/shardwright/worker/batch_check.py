"""Before serving: may decodes of several lengths be given as a batch to code that attends by itself?

They end together, so something stands before the shorter ones, which is masked (adapt/own_requests.py).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shardwright.errors import UnsupportedModelError
from shardwright.worker.packed import PackedModel
from shardwright.worker.self_check import TOLERANCE
from shardwright.worker.state_slots import StateSlotModel
from shardwright.worker.step import Ints, StepTables

LONG_CONTEXT = 3000
"""Tokens of a sequence that is compared in a batch and alone, if as many are served: more than code chooses from, or
puts into a block."""

MOST_CHECKED_BYTES = 1 << 30
"""Memory that these may take."""


@torch.inference_mode()
def check_batches(
    model: PackedModel | StateSlotModel, *, num_positions: int, vocab_size: int, block_size: int, dtype: torch.dtype
) -> None:
    """Whether code that attends by itself gives a long sequence the same in a batch, beside a shorter one, as alone.

    Before the shorter one stands what is masked. Code that looks at it all the same, once there is more than it
    chooses from or puts into a block, may do so only where contexts are longer than those of `check_logits`.

    Args:
        model: to check; it gets a cache of random numbers, to be replaced afterwards.
        num_positions, vocab_size, block_size: of the engine.
        dtype: of the model's weights.

    Raises: UnsupportedModelError if it does not.
    """
    most = MOST_CHECKED_BYTES // (2 * len(model.groups) * model.bytes_per_block(1))
    longest = min(LONG_CONTEXT, num_positions - 1, most)
    lengths = np.array([longest, longest * 3 // 4], dtype=np.int64)
    if lengths.min() < 1:
        return
    together = _random_decode(model, lengths, [0, 1], vocab_size, block_size)
    alone = torch.cat([_random_decode(model, lengths, [row], vocab_size, block_size) for row in (0, 1)])
    if not alone.numel():  # of a pipeline stage before the last
        return
    difference = float((together - alone).square().mean().sqrt() / alone.std().clamp_min(1e-6))
    if not difference <= TOLERANCE[dtype]:
        raise UnsupportedModelError(
            f"long sequences get logits that differ by {difference:.2g} of their spread in a batch, in {dtype}"
        )


def _random_decode(
    model: PackedModel | StateSlotModel, lengths: Ints, rows: list[int], vocab_size: int, block_size: int
) -> Tensor:
    """Logits [R, vocab] of one token each of sequences of random numbers, the same ones at every call."""
    blocks_per_row = int(lengths.max()) // block_size + 1
    table = np.arange(1, len(lengths) * blocks_per_row + 1, dtype=np.int32).reshape(len(lengths), blocks_per_row)
    model.allocate(num_rows=len(lengths), num_blocks=table.size * len(model.groups), block_size=block_size)
    model.fill(seed=0)
    tokens = np.random.default_rng(0).integers(0, vocab_size, (len(lengths), int(lengths.max()) + 1), dtype=np.int32)
    step = StepTables(
        token_rows=tokens,
        block_tables=[table + group * table.size for group in range(len(model.groups))],
        rows=np.array(rows, dtype=np.int64),
        num_computed=lengths[rows],
        num_tokens=np.ones(len(rows), dtype=np.int64),
        logits_rows=np.arange(len(rows)),
    )
    return model.compute(step).float()
