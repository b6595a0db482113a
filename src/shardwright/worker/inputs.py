"""Build the packed inputs of a step from per-row tables, without a loop over requests."""

from __future__ import annotations

import numpy as np
import torch

from shardwright.adapt.paged import ForwardInputs
from shardwright.attention.arrays import on_device
from shardwright.attention.layout import AttentionBackend, StepLayout
from shardwright.cache.spec import CacheGroup
from shardwright.worker.step import StepTables


def build_inputs(
    step: StepTables, *, groups: list[CacheGroup], backend: AttentionBackend, device: torch.device
) -> ForwardInputs:
    """Pack the tokens of a step.

    Args:
        step: what to compute.
        groups: cache groups, in the order of the step's tables.
        backend: makes the plans, and knows the block size.
        device: of the tensors.
    """
    query_starts = np.zeros(len(step.rows) + 1, dtype=np.int64)
    np.cumsum(step.num_tokens, out=query_starts[1:])
    row_of_token = np.repeat(step.rows, step.num_tokens)
    positions = np.arange(query_starts[-1]) + np.repeat(step.num_computed - query_starts[:-1], step.num_tokens)
    layout = StepLayout(step.num_computed, step.num_tokens, query_starts)
    block_tables = [table[step.rows] for table in step.block_tables]
    place, offset = np.divmod(positions, backend.block_size)

    input_ids, position_ids, logits_rows, *slot_mappings = on_device(
        [
            step.token_rows[row_of_token, positions].astype(np.int64),
            positions,
            step.logits_rows.astype(np.int64, copy=False),
            *(table[row_of_token, place].astype(np.int64) * backend.block_size + offset for table in step.block_tables),
        ],
        device,
    )
    return ForwardInputs(
        input_ids=input_ids,
        position_ids=position_ids,
        slot_mappings=slot_mappings,
        plans=[
            backend.prepare(layout, table, group.visibility) for table, group in zip(block_tables, groups, strict=True)
        ],
        logits_rows=logits_rows,
        layout=layout,
        block_tables=block_tables,
    )
