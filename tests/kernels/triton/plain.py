"""What the kernels do, in plain PyTorch with the same arguments: for tests of what is around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardwright.attention.kv_cache import stored
from shardwright.attention.layout import AttentionParams
from shardwright.attention.reference import attend
from shardwright.cache.spec import Visibility, VisibilityKind
from shardwright.kernels.triton.attention import Tiles


def paged_attention(
    query_THD: Tensor,
    keys_NKD: Tensor,
    values_NKV: Tensor,
    tiles: Tiles,
    output_THV: Tensor,
    *,
    block_size: int,
    visibility: str,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    bias_HN: Tensor | None,
    **_: Any,
) -> None:
    """As kernels.triton.attention.paged_attention."""
    params = AttentionParams(scale, softcap, sinks_H, bias_HN)
    seen = Visibility(VisibilityKind(visibility), window)
    starts, computed = tiles.starts.tolist(), tiles.computed.tolist()
    for sequence, first in zip(tiles.sequence_N.tolist(), tiles.token_N.tolist(), strict=True):
        last = min(first + tiles.num_queries, starts[sequence + 1])
        offset = computed[sequence] - starts[sequence]
        places = torch.from_numpy(np.arange(last + offset))  # torch's own count would be taken for the model's
        slots = tiles.tables[sequence].long()[places // block_size] * block_size + places % block_size
        positions = places[first + offset :]
        begins = torch.tensor([seen.first_visible(position) for position in positions.tolist()])
        mask_TL = (places <= positions[:, None]) & (places >= begins[:, None])
        made = attend(query_THD[first:last], keys_NKD[slots].float(), values_NKV[slots].float(), mask_TL, params)
        output_THV[first:last] = made.to(output_THV.dtype)


def store_rows(
    slots_T: Tensor, key_TKD: Tensor, value_TKV: Tensor, keys_NKD: Tensor, values_NKV: Tensor | None
) -> None:
    """As kernels.triton.cache_rows.store_rows."""
    keys_NKD[slots_T] = stored(key_TKD, keys_NKD.dtype)
    if values_NKV is not None:
        values_NKV[slots_T] = stored(value_TKV, values_NKV.dtype)
