"""Unit groups by names and shapes alone: what is left where a model's dataflow cannot be traced.

Parameters that a plan cuts belong together if their modules have the same parent. Heads are counted by the usual
attributes. Both may be wrong, which a check or proof shows.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

from torch import nn

from shardwright.plans.groups import Member, UnitGroup, UnitKind
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.resolve import cut_dimension, matching_pattern, parameters_of
from shardwright.plans.styles import Cut

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "nheads", "heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_head_kv", "kv_heads")

FEATURE_UNITS = (64, 32, 16, 8)
"""Hidden features of an MLP are dealt in multiples of the largest of these that leaves work for everybody."""


def groups_by_names(module: nn.Module, plan: ParallelPlan) -> list[UnitGroup]:
    """Unit groups of what a plan cuts."""
    found: dict[str, list[tuple[str, int, int, Cut]]] = defaultdict(list)
    for name, aliases, parameter, owner in parameters_of(module):
        pattern = next((p for n in (name, *aliases) if (p := matching_pattern(plan, n)) is not None), None)
        if pattern is None:
            continue
        style = plan.styles[pattern]
        dim = cut_dimension(owner, name.rpartition(".")[2], parameter.ndim, style)
        if dim is None:
            continue
        levels = name.split(".")
        holder = ".".join(levels[: -2 if isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D" else -1])
        kind = "vocabulary " if style.cut is Cut.VOCABULARY else "experts " if style.cut is Cut.EXPERTS else ""
        found[kind + holder].append((name, dim, parameter.shape[dim], style.cut))
    return [group for key, members in found.items() if (group := _group(module, key, members)) is not None]


def _group(module: nn.Module, key: str, members: list[tuple[str, int, int, Cut]]) -> UnitGroup | None:
    kind, _, holder = key.rpartition(" ")
    lengths = {length for _, _, length, _ in members}
    if kind:
        units = next(iter(lengths))
        if len(lengths) > 1:
            return None
        whole = [Member(name, dim, ((0, length),), units) for name, dim, length, _ in members]
        return UnitGroup(UnitKind(kind), units, tuple(whole), "names")
    heads, kv_heads = _heads(module, module.get_submodule(holder))
    rows = {length for _, _, length, cut in members if cut is Cut.ROWS}
    if heads and len(members) > 2 and all(length % kv_heads == 0 for length in lengths):
        head_dim = max(rows or lengths) // heads
        fused = (heads + 2 * kv_heads) * head_dim
        made: list[Member] = []
        for name, dim, length, _ in members:
            if length == fused:
                ends = (0, heads * head_dim, (heads + kv_heads) * head_dim, fused)
                made.append(Member(name, dim, tuple(pairwise(ends)), kv_heads))
            else:
                made.append(Member(name, dim, ((0, length),), kv_heads if length == kv_heads * head_dim else heads))
        return UnitGroup(UnitKind.HEADS, heads, tuple(made), "names")
    size = min(rows or lengths)
    unit = next((u for u in FEATURE_UNITS if size % u == 0 and size // u >= 8), 1)
    if any(length % size for length in lengths):
        return None
    made = [
        Member(name, dim, tuple((i * size, (i + 1) * size) for i in range(length // size)), size // unit)
        for name, dim, length, _ in members
    ]
    return UnitGroup(UnitKind.FEATURES, size // unit, tuple(made), "names")


def _heads(module: nn.Module, holder: nn.Module) -> tuple[int, int]:
    """Query heads and key and value heads of an attention module; (0, 0) if nothing says so."""
    config: Any = getattr(module, "config", None)
    sources: list[Any] = [holder]
    if "att" in type(holder).__name__.lower():
        sources.append(config.get_text_config() if hasattr(config, "get_text_config") else config)
    for source in sources:
        heads = _first(source, HEADS)
        if heads:
            return heads, next((k for s in sources if (k := _first(s, KV_HEADS))), heads)
    return 0, 0


def _first(source: Any, names: tuple[str, ...]) -> int:
    values = (getattr(source, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
