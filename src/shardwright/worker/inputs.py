"""Build a step's inputs from per-row tables, without a loop over requests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shardwright.adapt.served_model import ForwardInputs
from shardwright.attention.layout import AttentionBackend, StepLayout
from shardwright.cache.spec import CacheGroup


def build_inputs(
    *,
    token_rows: np.ndarray,
    block_tables: list[np.ndarray],
    rows: np.ndarray,
    num_computed: np.ndarray,
    num_tokens: np.ndarray,
    logits_rows: np.ndarray,
    groups: list[CacheGroup],
    block_size: int,
    backend: AttentionBackend,
    device: torch.device,
) -> ForwardInputs:
    """Pack the tokens of a step.

    Args:
        token_rows: [max rows, max_model_len] int32, all tokens known of each row.
        block_tables: per cache group, [max rows, max blocks] int32.
        rows, num_computed, num_tokens: [S] int64, as in worker.batch.Batch.
        logits_rows: [R] int64, places in the packed batch.
        groups: cache groups, in the order of the tables.
        block_size: tokens per block.
        backend: makes the plans.
        device: of the tensors.
    """
    query_starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(num_tokens, out=query_starts[1:])
    row_of_token = np.repeat(rows, num_tokens)
    positions = np.arange(query_starts[-1]) + np.repeat(num_computed - query_starts[:-1], num_tokens)
    layout = StepLayout(num_computed, num_tokens, query_starts)
    place, offset = np.divmod(positions, block_size)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64, copy=False)).to(device, non_blocking=True)

    return ForwardInputs(
        input_ids=tensor(token_rows[row_of_token, positions]),
        position_ids=tensor(positions),
        slot_mappings=[
            tensor(table[row_of_token, place].astype(np.int64) * block_size + offset) for table in block_tables
        ],
        plans=[
            backend.prepare(layout, table[rows], group.visibility)
            for table, group in zip(block_tables, groups, strict=True)
        ],
        logits_rows=tensor(logits_rows),
    )
