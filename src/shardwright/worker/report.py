"""What a rank found out when it had loaded its part of the model, and what it is told to make room for."""

from __future__ import annotations

import msgspec

from shardwright.cache.spec import CacheGroup, Visibility


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What every rank of a model finds the same: all of it, whatever a rank's part is."""

    path: str
    """Its directory; empty for code that has none."""
    fingerprint: str
    """Of the files: ranks on different machines must read the same."""
    model_type: str
    architecture: str
    dtype: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """One rank, loaded and measured."""

    facts: ModelFacts
    host: str
    """Name of its machine."""
    device: str
    weight_bytes: int
    num_layers: int
    """Attention layers that are its own."""
    groups: list[CacheGroup]
    """Of its own layers."""
    budget_bytes: int
    """Memory for its part of the cache."""
    bytes_per_block: int
    bytes_per_row: int
    max_step_tokens: int | None
    """Most tokens that its code takes in one step."""
    takes_chunks: bool
    reuses_prefixes: bool
    can_rewind: bool
    attention_rung: str
    attention_reason: str
    attention_backend: str = ""
    """What computes the attention that is ours; empty: there is none."""
    load_s: float
    ready_s: float


class Allocation(msgspec.Struct, frozen=True, kw_only=True):
    """What every rank makes room for: the same blocks everywhere, so that one block table serves all."""

    groups: list[CacheGroup]
    """Of the whole model; table updates name them by their places here."""
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


def local_groups(groups: list[CacheGroup], own: list[CacheGroup]) -> list[int | None]:
    """Which of a rank's own groups each of the whole model's is: the n-th of a visibility is its n-th of it.

    Returns: per group of the model, the place in `own`; None if the rank has no layer of it.
    """
    places: dict[Visibility, list[int]] = {}
    for place, group in enumerate(own):
        places.setdefault(group.visibility, []).append(place)
    left = {visibility: iter(found) for visibility, found in places.items()}
    return [next(left.get(group.visibility, iter(())), None) for group in groups]


def merged_groups(parts: list[list[CacheGroup]], num_layers: list[int]) -> list[CacheGroup]:
    """Cache groups of the whole model, of those of its pipeline stages.

    Args:
        parts: groups of each stage, in order.
        num_layers: layers of each stage, by which the numbers of those after it are shifted.
    """
    layers: dict[tuple[Visibility, int], list[int]] = {}
    first = 0
    for groups, count in zip(parts, num_layers, strict=True):
        seen: dict[Visibility, int] = {}
        for group in groups:
            ordinal = seen.get(group.visibility, 0)
            seen[group.visibility] = ordinal + 1
            layers.setdefault((group.visibility, ordinal), []).extend(first + layer for layer in group.layers)
        first += count
    return [CacheGroup(visibility, tuple(indices)) for (visibility, _), indices in layers.items()]
