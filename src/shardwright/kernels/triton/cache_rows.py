"""Writing to the paged cache on a GPU: keys and values in one launch."""

from __future__ import annotations

from torch import Tensor

from shardwright.kernels.triton.programs import cache_rows as programs
from shardwright.kernels.triton.types import as_stored, power_of_two

MOST_NUMBERS = 4096
"""Of one program."""


def store_rows(
    slots_T: Tensor, key_TKD: Tensor, value_TKV: Tensor, keys_NKD: Tensor, values_NKV: Tensor | None
) -> None:
    """Store the keys and values of a step.

    Args:
        slots_T: [T] int64, rows of the cache, distinct but for those that nobody reads.
        key_TKD, value_TKV: [T, K, D] and [T, K, V], numbers of one head contiguous.
        keys_NKD, values_NKV: the cache, [num_slots, K, D] and [num_slots, K, V], of any floating type, float8_e4m3fn
            included, numbers of one head contiguous; no values where the keys hold them.

    Its reference is attention.kv_cache.LayerCache.write.
    """
    num_tokens, num_kv_heads, key_dim = key_TKD.shape
    value_dim = value_TKV.shape[2]
    if not num_tokens:
        return
    key_TKD, value_TKV = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (key_TKD, value_TKV))
    key_width, value_width = power_of_two(key_dim), power_of_two(value_dim)
    num_heads = min(power_of_two(num_kv_heads), max(1, MOST_NUMBERS // max(key_width, value_width)))
    keys_NKD = as_stored(keys_NKD)
    stored = keys_NKD if values_NKV is None else as_stored(values_NKV)
    programs.store_rows[num_tokens, -(-num_kv_heads // num_heads)](
        slots_T,
        key_TKD,
        value_TKV,
        keys_NKD,
        stored,
        key_TKD.stride(0),
        key_TKD.stride(1),
        value_TKV.stride(0),
        value_TKV.stride(1),
        keys_NKD.stride(0),
        keys_NKD.stride(1),
        stored.stride(0),
        stored.stride(1),
        num_kv_heads,
        KEY_DIM=key_dim,
        KEY_WIDTH=key_width,
        VALUE_DIM=value_dim,
        VALUE_WIDTH=value_width,
        NUM_HEADS=num_heads,
        HAS_VALUES=values_NKV is not None,
        num_warps=4,
    )
