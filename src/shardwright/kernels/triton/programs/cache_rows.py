"""A step's keys and values go to their slots in the paged cache."""

import triton
import triton.language as tl

from shardwright.kernels.triton.programs.float8 import encoded


@triton.jit
def store_rows(
    slots,
    new_keys,
    new_values,
    keys,
    values,
    new_key_token_stride,
    new_key_head_stride,
    new_value_token_stride,
    new_value_head_stride,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    num_kv_heads,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HAS_VALUES: tl.constexpr,
):
    """Program (token, NUM_HEADS of its KV heads)."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * NUM_HEADS + tl.arange(0, NUM_HEADS)
    slot = tl.load(slots + token)
    is_head = (heads < num_kv_heads)[:, None]
    columns = tl.arange(0, KEY_WIDTH)[None, :]
    mask = is_head & (columns < KEY_DIM)
    row = tl.load(new_keys + token * new_key_token_stride + heads[:, None] * new_key_head_stride + columns, mask=mask)
    place = keys + slot * key_slot_stride + heads[:, None] * key_head_stride + columns
    tl.store(place, _stored(row, keys.dtype.element_ty), mask=mask)
    if HAS_VALUES:
        columns = tl.arange(0, VALUE_WIDTH)[None, :]
        mask = is_head & (columns < VALUE_DIM)
        row = tl.load(
            new_values + token * new_value_token_stride + heads[:, None] * new_value_head_stride + columns, mask=mask
        )
        place = values + slot * value_slot_stride + heads[:, None] * value_head_stride + columns
        tl.store(place, _stored(row, values.dtype.element_ty), mask=mask)


@triton.jit
def _stored(row, TYPE: tl.constexpr):
    """Numbers as the cache has them: those of uint8 have 8 bits."""
    if tl.uint8 == TYPE:
        return encoded(row.to(tl.float32))
    else:
        return row.to(TYPE)
