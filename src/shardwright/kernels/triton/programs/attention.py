"""Attention over the paged cache, tile by tile (FlashAttention's online softmax), and the sum of what splits give.

A tile is some consecutive queries of one sequence, with some of the query heads that share a KV head: its rows are
those queries times those heads, so that keys and values are read once for all of them. A decode is a tile of one query.
The context of a tile may be split among several programs, whose results `combine` adds up (Flash-Decoding).

Source: FlashAttention-2 (arXiv 2307.08691) for the order of the loops; pytorch.org/blog/flash-decoding for the splits.
"""

import triton
import triton.language as tl

from shardwright.kernels.triton.programs.float8 import decoded

FULL = tl.constexpr(0)
SLIDING = tl.constexpr(1)
CHUNKED = tl.constexpr(2)


@triton.jit
def attend(
    query,
    keys,
    values,
    output,
    sums,
    stats,
    tables,
    starts,
    computed,
    tile_sequence,
    tile_token,
    sinks,
    bias,
    scale,
    softcap,
    size,
    num_distances,
    query_token_stride,
    query_head_stride,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    table_stride,
    num_heads,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_MAIN: tl.constexpr,
    KEY_REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUES_IN_KEYS: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    VISIBILITY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One tile of queries and heads over one split of its context.

    Program (tile, KV head and part of its query heads, split). The width of keys is KEY_MAIN, a power of two, and
    KEY_REST, one or 0: 576 is read as 512 and 64, not as 1024. Products are of the type OPERAND, sums in float32. Keys
    and values of uint8 are numbers of 8 bits.
    """
    tile = tl.program_id(0)
    part_of_group = tl.program_id(1)
    split = tl.program_id(2)
    parts_per_group = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    kv_head = part_of_group // parts_per_group
    first_in_group = part_of_group % parts_per_group * TILE_HEADS

    sequence = tl.load(tile_sequence + tile)
    first_token = tl.load(tile_token + tile)
    end_token = tl.minimum(first_token + TILE_QUERIES, tl.load(starts + sequence + 1))
    offset = tl.load(computed + sequence) - tl.load(starts + sequence)

    rows = tl.arange(0, TILE_QUERIES * TILE_HEADS)
    token = first_token + rows // TILE_HEADS
    in_group = first_in_group + rows % TILE_HEADS
    head = kv_head * GROUP + in_group
    is_row = (token < end_token) & (in_group < GROUP)
    position = token + offset
    first_seen = _first_visible(position, size, VISIBILITY)
    begin = _first_visible(first_token + offset, size, VISIBILITY)
    end = end_token + offset

    main = tl.arange(0, KEY_MAIN)
    query_row = query + token.to(tl.int64)[:, None] * query_token_stride + head[:, None] * query_head_stride
    query_main = tl.load(query_row + main[None, :], mask=is_row[:, None] & (main < KEY_DIM)[None, :], other=0.0)
    query_main = query_main.to(OPERAND)
    if KEY_REST > 0:
        rest = KEY_MAIN + tl.arange(0, KEY_REST)
        query_rest = tl.load(query_row + rest[None, :], mask=is_row[:, None] & (rest < KEY_DIM)[None, :], other=0.0)
        query_rest = query_rest.to(OPERAND)

    columns = tl.arange(0, VALUE_WIDTH)
    highest = tl.full([TILE_QUERIES * TILE_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_QUERIES * TILE_HEADS], tl.float32)
    summed = tl.zeros([TILE_QUERIES * TILE_HEADS, VALUE_WIDTH], tl.float32)

    aligned = begin // TILE_KEYS * TILE_KEYS
    per_split = tl.cdiv(tl.cdiv(end - aligned, TILE_KEYS), NUM_SPLITS) * TILE_KEYS
    low = aligned + split * per_split
    for place in range(low, tl.minimum(low + per_split, end), TILE_KEYS):
        places = place + tl.arange(0, TILE_KEYS)
        exists = (places >= begin) & (places < end)  # else nobody sees it, and it may be anything, NaN as well
        block = tl.load(tables + sequence.to(tl.int64) * table_stride + places // CACHE_BLOCK, mask=exists, other=0)
        slot = block.to(tl.int64) * CACHE_BLOCK + places % CACHE_BLOCK

        key_column = keys + slot[None, :] * key_slot_stride + kv_head * key_head_stride
        key_main = tl.load(key_column + main[:, None], mask=exists[None, :] & (main < KEY_DIM)[:, None], other=0)
        key_main = _operand(key_main, OPERAND)
        scores = tl.dot(query_main, key_main, input_precision="ieee")
        if KEY_REST > 0:
            key_rest = tl.load(key_column + rest[:, None], mask=exists[None, :] & (rest < KEY_DIM)[:, None], other=0)
            scores = tl.dot(query_rest, _operand(key_rest, OPERAND), scores, input_precision="ieee")
        scores = scores * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
        if HAS_BIAS:
            distance = tl.minimum(tl.maximum(position[:, None] - places[None, :], 0), num_distances - 1)
            scores += tl.load(bias + head[:, None] * num_distances + distance, mask=is_row[:, None], other=0.0)
        sees = exists[None, :] & (places[None, :] <= position[:, None]) & (places[None, :] >= first_seen[:, None])
        scores = tl.where(sees, scores, float("-inf"))

        higher = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # of rows that have seen nothing yet
        weights = tl.exp(scores - shift[:, None])
        faded = tl.exp(highest - shift)
        total = total * faded + tl.sum(weights, 1)
        if VALUES_IN_KEYS:
            value = tl.trans(key_main)
        else:
            value_row = values + slot[:, None] * value_slot_stride + kv_head * value_head_stride
            value = tl.load(
                value_row + columns[None, :], mask=exists[:, None] & (columns < VALUE_DIM)[None, :], other=0
            )
            value = _operand(value, OPERAND)
        weights = weights.to(query.dtype.element_ty).to(OPERAND)
        summed = tl.dot(weights, value, summed * faded[:, None], input_precision="ieee")
        highest = higher

    is_stored = is_row[:, None] & (columns < VALUE_DIM)[None, :]
    if NUM_SPLITS == 1:
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=is_row, other=0.0)
            higher = tl.maximum(highest, sink)
            faded = tl.exp(highest - higher)
            total = total * faded + tl.exp(sink - higher)
            summed = summed * faded[:, None]
        total = tl.where(is_row, total, 1.0)
        made = (summed / total[:, None]).to(output.dtype.element_ty)
        output_row = output + (token.to(tl.int64) * num_heads + head)[:, None] * VALUE_DIM
        tl.store(output_row + columns[None, :], made, mask=is_stored)
    else:
        row = ((tile.to(tl.int64) * TILE_QUERIES + rows // TILE_HEADS) * num_heads + head) * NUM_SPLITS + split
        tl.store(sums + row[:, None] * VALUE_DIM + columns[None, :], summed, mask=is_stored)
        tl.store(stats + row * 2, highest, mask=is_row)
        tl.store(stats + row * 2 + 1, total, mask=is_row)


@triton.jit
def combine(
    sums,
    stats,
    output,
    starts,
    tile_sequence,
    tile_token,
    sinks,
    num_heads,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
):
    """Add up what the splits of one query and head gave: program (query of a tile, head)."""
    query = tl.program_id(0)
    head = tl.program_id(1)
    tile = query // TILE_QUERIES
    token = tl.load(tile_token + tile) + query % TILE_QUERIES
    if token < tl.load(starts + tl.load(tile_sequence + tile) + 1):
        columns = tl.arange(0, VALUE_WIDTH)
        is_column = columns < VALUE_DIM
        first_row = (query.to(tl.int64) * num_heads + head) * NUM_SPLITS
        all_rows = first_row + tl.arange(0, NUM_SPLITS)
        highest = tl.max(tl.load(stats + all_rows * 2), 0)
        if HAS_SINKS:
            sink = tl.load(sinks + head)
            highest = tl.maximum(highest, sink)
        total = tl.sum(tl.load(stats + all_rows * 2 + 1) * tl.exp(tl.load(stats + all_rows * 2) - highest), 0)
        if HAS_SINKS:
            total += tl.exp(sink - highest)
        summed = tl.zeros([VALUE_WIDTH], tl.float32)
        for first in range(0, NUM_SPLITS, SPLITS_AT_ONCE):
            row = first_row + first + tl.arange(0, SPLITS_AT_ONCE)
            faded = tl.exp(tl.load(stats + row * 2) - highest)
            parts = tl.load(sums + row[:, None] * VALUE_DIM + columns[None, :], mask=is_column[None, :], other=0.0)
            summed += tl.sum(parts * faded[:, None], 0)
        made = summed / total
        output_row = output + (token.to(tl.int64) * num_heads + head) * VALUE_DIM
        tl.store(output_row + columns, made.to(output.dtype.element_ty), mask=is_column)


@triton.jit
def _first_visible(position, size, VISIBILITY: tl.constexpr):
    """First position that a query sees; as cache.spec.Visibility has it."""
    if VISIBILITY == SLIDING:
        return tl.maximum(position - size + 1, 0)
    elif VISIBILITY == CHUNKED:
        return position // size * size
    else:
        return position * 0


@triton.jit
def _operand(stored, OPERAND: tl.constexpr):
    """What is in the cache as products take it."""
    if stored.dtype == tl.uint8:
        return decoded(stored).to(OPERAND)
    else:
        return stored.to(OPERAND)
