"""Steps of a packed model whose code treats some token ids in a way of its own (adapt/special_ids.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardwright.worker.step import StepTables


def without_special_ids(step: StepTables, special_ids: list[int]) -> tuple[StepTables, list[bool]]:
    """The step with another id in place of the special ones, and which of its sequences have any, so far.

    What such a sequence leaves in the cache from the first special id on is of use to nobody, and nobody uses it: a
    block is found again by all tokens up to its end.
    """
    ends = step.num_computed + step.num_tokens
    rows = [step.token_rows[row, :end] for row, end in zip(step.rows, ends, strict=True)]
    has_special = [bool(np.isin(tokens, special_ids).any()) for tokens in rows]
    if not any(has_special):
        return step, has_special
    ordinary = next(i for i in range(len(special_ids) + 1) if i not in special_ids)
    token_rows = step.token_rows.copy()
    affected = step.rows[np.array(has_special)]
    token_rows[affected] = np.where(np.isin(token_rows[affected], special_ids), ordinary, token_rows[affected])
    return replace(step, token_rows=token_rows), has_special
