"""Paged attention on a GPU: sizes of tiles and splits, and the launches.

Shape suffixes are those of attention/layout.py, and N for tiles, P for splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwright.kernels.triton.programs import attention as programs
from shardwright.kernels.triton.types import as_stored, operand_type, power_of_two

LEAST_ROWS = 16
"""Of a tile: fewer would not fill the smallest product of a tensor core."""

DECODE_ROWS = 64
"""Most rows of a tile of one query: query heads that share a KV head and what is read of it."""

PROMPT_ROWS = 64
TILE_KEYS = 64
"""Rows of a tile of a prompt, and keys taken at a time, of up to 128 numbers in half precision."""

TILE_BYTES = 48 << 10
"""Most memory of the keys and values of one turn: two are in flight, in the 100 to 228 KiB of a multiprocessor."""

WIDE_VALUES = 256
"""Sums of more numbers than that leave registers for half the rows."""

MAX_SPLITS = 64

COMBINED_NUMBERS = 4096
"""That one program holds of what splits gave."""

_KINDS = {"full": 0, "sliding": 1, "chunked": 2}


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries of a step, cut into tiles; all on the device, int32."""

    tables: Tensor
    """[S, B]: block of positions i * block_size and on."""
    starts: Tensor
    """[S + 1]: sequence i has tokens starts[i] to starts[i + 1], which follow each other in it."""
    computed: Tensor
    """[S]: position of its first token of this step."""
    sequence_N: Tensor
    token_N: Tensor
    """First token of each tile."""
    num_queries: int
    """Of a tile; the last one of a sequence may have fewer."""


@dataclass(frozen=True, slots=True)
class TileShape:
    """How the work on one layer is cut."""

    num_queries: int
    num_heads: int
    """Of those that share a KV head."""
    num_keys: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(
        cls, *, group: int, key_dim: int, value_dim: int, dtype: torch.dtype, is_decode: bool, values_in_keys: bool
    ) -> TileShape:
        """For a layer with `group` query heads per KV head.

        Args:
            group, key_dim, value_dim: of the layer.
            dtype: of queries.
            is_decode: whether tiles have one query.
            values_in_keys: whether keys are read as values too.
        """
        is_wide = power_of_two(value_dim) > WIDE_VALUES
        rows = (DECODE_ROWS if is_decode else PROMPT_ROWS) // (2 if is_wide else 1)
        num_heads = min(power_of_two(group), rows)
        num_queries = max(1, (LEAST_ROWS if is_decode else rows) // num_heads)
        main, rest = key_parts(key_dim)
        bytes_per_key = (main + rest + (0 if values_in_keys else value_width(value_dim))) * dtype.itemsize
        num_keys = TILE_KEYS
        while num_keys > LEAST_ROWS and num_keys * bytes_per_key > TILE_BYTES:
            num_keys //= 2
        return cls(num_queries, num_heads, num_keys, num_warps=8 if is_wide else 4, num_stages=2)


def paged_attention(
    query_THD: Tensor,
    keys_NKD: Tensor,
    values_NKV: Tensor,
    tiles: Tiles,
    output_THV: Tensor,
    *,
    shape: TileShape,
    num_splits: int,
    block_size: int,
    visibility: str,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    bias_HN: Tensor | None,
    values_in_keys: bool,
) -> None:
    """Attention of some queries of a step.

    Args:
        query_THD: [T, H, D] of any strides over T and H; H is a multiple of K.
        keys_NKD: [num_slots, K, D], same type or float8_e4m3fn; numbers of one head contiguous.
        values_NKV: [num_slots, K, V], likewise.
        tiles: which queries, and where their contexts are.
        output_THV: [T, H, V] contiguous, type of the query: rows of those queries are written.
        shape: of the tiles; `num_queries` is theirs.
        num_splits: a power of two: parts that the context of each tile is cut into.
        block_size: tokens per block.
        visibility, window: which positions a query sees: full, sliding or chunked, of so many tokens.
        scale, softcap, sinks_H, bias_HN: as attention.layout.AttentionParams has them.
        values_in_keys: the values are the first numbers of the keys.

    Its reference is attention/reference.py.
    """
    assert shape.num_queries == tiles.num_queries, "tiles are cut for another shape"
    num_tiles = len(tiles.token_N)
    num_heads, key_dim = query_THD.shape[1:]
    num_kv_heads, value_dim = values_NKV.shape[1:]
    group = num_heads // num_kv_heads
    if query_THD.stride(2) != 1:
        query_THD = query_THD.contiguous()
    sinks = None if sinks_H is None else sinks_H.float().contiguous()
    bias = None if bias_HN is None else bias_HN.float().contiguous()
    keys_NKD, values_NKV = as_stored(keys_NKD), as_stored(values_NKV)
    main, rest = key_parts(key_dim)
    width = value_width(value_dim)
    reads_once = values_in_keys and width == main
    sums, stats = output_THV, output_THV
    if num_splits > 1:
        num_rows = num_tiles * shape.num_queries * num_heads * num_splits
        sums = output_THV.new_empty(num_rows, value_dim, dtype=torch.float32)
        stats = output_THV.new_empty(num_rows, 2, dtype=torch.float32)
    common = {
        "VALUE_DIM": value_dim,
        "VALUE_WIDTH": width,
        "TILE_QUERIES": shape.num_queries,
        "NUM_SPLITS": num_splits,
        "HAS_SINKS": sinks is not None,
    }
    programs.attend[num_tiles, num_kv_heads * -(-group // shape.num_heads), num_splits](
        query_THD,
        keys_NKD,
        values_NKV,
        output_THV,
        sums,
        stats,
        tiles.tables,
        tiles.starts,
        tiles.computed,
        tiles.sequence_N,
        tiles.token_N,
        query_THD if sinks is None else sinks,
        query_THD if bias is None else bias,
        scale,
        softcap or 0.0,
        window or 0,
        0 if bias is None else bias.shape[1],
        query_THD.stride(0),
        query_THD.stride(1),
        keys_NKD.stride(0),
        keys_NKD.stride(1),
        values_NKV.stride(0),
        values_NKV.stride(1),
        tiles.tables.stride(0),
        num_heads,
        GROUP=group,
        KEY_DIM=key_dim,
        KEY_MAIN=main,
        KEY_REST=rest,
        VALUES_IN_KEYS=reads_once,
        CACHE_BLOCK=block_size,
        TILE_HEADS=shape.num_heads,
        TILE_KEYS=shape.num_keys,
        VISIBILITY=_KINDS[visibility],
        HAS_SOFTCAP=softcap is not None,
        HAS_BIAS=bias is not None,
        OPERAND=operand_type(query_THD.dtype),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **common,
    )
    if num_splits > 1:
        programs.combine[num_tiles * shape.num_queries, num_heads](
            sums,
            stats,
            output_THV,
            tiles.starts,
            tiles.sequence_N,
            tiles.token_N,
            query_THD if sinks is None else sinks,
            num_heads,
            SPLITS_AT_ONCE=min(num_splits, max(1, COMBINED_NUMBERS // width)),
            num_warps=4,
            **common,
        )


def splits_for(
    *, num_tiles: int, num_kv_heads: int, group: int, shape: TileShape, longest: int, num_processors: int
) -> int:
    """Into how many parts contexts are cut, so that the programs keep all multiprocessors busy; a power of two.

    Args:
        num_tiles: of the step.
        num_kv_heads, group: of the layer.
        shape: of its tiles.
        longest: tokens of the longest context.
        num_processors: multiprocessors of the device.
    """
    programs_without = num_tiles * num_kv_heads * -(-group // shape.num_heads)
    wanted = 2 * num_processors // max(programs_without, 1)
    most = min(wanted, -(-longest // (2 * shape.num_keys)), MAX_SPLITS)
    return 1 << (max(most, 1).bit_length() - 1)


def key_parts(key_dim: int) -> tuple[int, int]:
    """The width of keys as a power of two and a rest, one too or 0, each wide enough for a product."""
    main = max(power_of_two(key_dim + 1) // 2, LEAST_ROWS)
    rest = key_dim - main
    if rest <= 0:
        return main, 0
    return main, max(power_of_two(rest), LEAST_ROWS)


def value_width(value_dim: int) -> int:
    """The width that values are read in."""
    return max(power_of_two(value_dim), LEAST_ROWS)
