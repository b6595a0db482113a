"""Storage of keys and values: flat rows per token, in lanes that cache groups share (see cache/spec.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwright.cache.spec import CacheGroup, LayerSpec, lane_elements
from shardwright.kernels.huge_pages import PAGE_BYTES, empty_in_huge_pages

FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = torch.finfo(FLOAT8).max


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's view of its lane. Row `block * block_size + offset` holds one token."""

    keys_NKD: Tensor
    """[num_slots, num_kv_heads, key_dim]."""
    values_NKV: Tensor
    """[num_slots, num_kv_heads, value_dim]; a view of the keys if these hold the values."""
    block_size: int
    values_in_keys: bool = False
    """See LayerSpec."""

    def write(self, slot_mapping: Tensor, key_TKD: Tensor, value_TKV: Tensor) -> None:
        """Store the step's keys and values; `slot_mapping` is [T], int64."""
        _bits(self.keys_NKD).index_copy_(0, slot_mapping, _bits(stored(key_TKD, self.keys_NKD.dtype)))
        if not self.values_in_keys:
            _bits(self.values_NKV).index_copy_(0, slot_mapping, _bits(stored(value_TKV, self.values_NKV.dtype)))

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of whole blocks, one after another: keys [B * block_size, K, D] and values [B * block_size, K, V]."""
        keys = self._gather(self.keys_NKD, blocks)
        if self.values_in_keys:
            return keys, keys[..., : self.values_NKV.shape[-1]]
        return keys, self._gather(self.values_NKV, blocks)

    def _gather(self, rows: Tensor, blocks: Tensor) -> Tensor:
        num_slots, num_heads, dim = rows.shape
        blocked = rows.view(num_slots // self.block_size, self.block_size, num_heads, dim)
        return blocked.index_select(0, blocks).view(-1, num_heads, dim)


class KVCache:
    """All keys and values of a rank.

    Args:
        layers: attention calls in order.
        groups: which layers share block tables.
        num_blocks: blocks of the pool, the null block not counted.
        block_size: tokens per block.
        dtype, device: of the storage. It is zeroed, for masked places are read too; on a CPU memory is claimed only
            when it is written to.
    """

    def __init__(
        self,
        layers: list[LayerSpec],
        groups: list[CacheGroup],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_slots = (num_blocks + 1) * block_size
        lanes = [
            (
                _zeros(num_slots, keys, dtype=dtype, device=device),
                _zeros(num_slots, values, dtype=dtype, device=device),
            )
            for keys, values in lane_elements(layers, groups)
        ]
        self.layers: list[LayerCache] = []
        self.group_of_layer: list[int] = []
        places = {index: (g, lane) for g, group in enumerate(groups) for lane, index in enumerate(group.layers)}
        for index, layer in enumerate(layers):
            group, lane = places[index]
            keys = _heads(lanes[lane][0], layer.num_kv_heads, layer.key_dim)
            if layer.values_in_keys:
                values = keys[..., : layer.value_dim]
            else:
                values = _heads(lanes[lane][1], layer.num_kv_heads, layer.value_dim)
            self.layers.append(LayerCache(keys, values, block_size, layer.values_in_keys))
            self.group_of_layer.append(group)
        self.num_blocks = num_blocks
        self._lanes = lanes
        self._block_size = block_size

    def fill(self, seed: int) -> None:
        """Write random numbers everywhere, as if long sequences had been computed, to look at what is made of them."""
        generator = torch.Generator(self._lanes[0][0].device).manual_seed(seed)
        for rows in (rows for lane in self._lanes for rows in lane):
            if rows.dtype is FLOAT8:
                rows.copy_(torch.empty_like(rows, dtype=torch.float16).normal_(generator=generator))
            else:
                rows.normal_(generator=generator)

    def scrub(self, blocks: Tensor) -> None:
        """Replace what is not a finite number in these blocks ([B] int64).

        Places that a mask hides are read all the same, and zero weight times not-a-number is not zero: without this, a
        request whose activations overflowed would spoil the next one in its blocks.
        """
        for rows in (rows for lane in self._lanes for rows in lane if rows.shape[-1]):
            blocked = rows.view(-1, self._block_size, rows.shape[-1])
            if rows.dtype is FLOAT8:
                mended = _bits(blocked)[blocks].view(FLOAT8).half().nan_to_num().to(FLOAT8)
                _bits(blocked)[blocks] = _bits(mended)
            else:
                blocked[blocks] = blocked[blocks].nan_to_num()


def stored(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of some type has them; in 8 bits the largest number is what larger ones become."""
    return (rows.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8) if dtype is FLOAT8 else rows).to(dtype)


def _bits(rows: Tensor) -> Tensor:
    """Rows as they are taken and put, which torch does not do with numbers of 8 bits: those by their bits."""
    return rows.view(torch.uint8) if rows.dtype is FLOAT8 else rows


def _zeros(num_slots: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or not width:
        return torch.zeros(num_slots, width, dtype=dtype, device=device)
    # Unlike torch.zeros, this leaves the zeroing to the system, which does it when a page is first written. The first
    # request writes a little for each layer: pages of megabytes would make it wait (measured: 0.3 s), and do not make
    # steps faster that read as much as fits in one of each.
    rows = empty_in_huge_pages(num_slots * width * dtype.itemsize, small=PAGE_BYTES)
    return rows.view(dtype).view(num_slots, width)


def _heads(lane: Tensor, num_heads: int, dim: int) -> Tensor:
    return lane[:, : num_heads * dim].view(len(lane), num_heads, dim)
