"""Memory for what a step computes: one block, in which tensors that do not live at the same time share places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ALIGNMENT = 64
"""Bytes: a line of the CPU's cache."""


def plan_arena(sizes: Mapping[int, int], uses: Sequence[frozenset[int]]) -> tuple[dict[int, int], int]:
    """Give each storage a place for as long as it is used.

    The first gap that is large enough is taken ("first fit" in the order of first use).

    Args:
        sizes: bytes of each storage, by its number.
        uses: per operation in order, the storages that it reads or writes. Others in it are ignored.

    Returns: the byte at which each storage begins, a multiple of ALIGNMENT, and the bytes of all.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for time, used in enumerate(uses):
        for storage in used & sizes.keys():
            first.setdefault(storage, time)
            last[storage] = time
    offsets: dict[int, int] = {}
    placed: list[tuple[int, int, int]] = []  # begin, end, last use
    total = 0
    for storage in sorted(first, key=lambda s: (first[s], s)):
        size = -(-max(sizes[storage], 1) // ALIGNMENT) * ALIGNMENT
        placed = [other for other in placed if other[2] >= first[storage]]
        begin = 0
        for other_begin, other_end, _ in sorted(placed):
            if begin + size <= other_begin:
                break
            begin = max(begin, other_end)
        offsets[storage] = begin
        placed.append((begin, begin + size, last[storage]))
        total = max(total, begin + size)
    return offsets, total
