"""Random steps over a paged cache, and attention computed by hand to judge them by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shardwright.attention.kv_cache import KVCache, LayerCache
from shardwright.attention.layout import AttentionBackend, AttentionParams, StepLayout
from shardwright.cache.spec import LayerSpec, Visibility, group_layers


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Shape of one attention layer."""

    num_kv_heads: int
    group: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Step:
    """One step of one layer; the cache holds what came before it."""

    layout: StepLayout
    block_tables: np.ndarray
    layer: LayerCache
    query: Tensor
    key: Tensor
    value: Tensor
    contexts: list[tuple[Tensor, Tensor]]
    """Per sequence, all its keys and values so far, this step's included."""

    def run(self, backend: AttentionBackend, visibility: Visibility, params: AttentionParams) -> Tensor:
        plan = backend.prepare(self.layout, self.block_tables, visibility)
        return backend.forward(self.query, self.key, self.value, self.layer, plan, params)


def make_step(
    sequences: list[tuple[int, int]],
    heads: Heads,
    *,
    block_size: int,
    visibility: Visibility,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Step:
    """A step of sequences given as (tokens computed before, tokens in this step).

    Blocks lie in random order; what fell out of the window is the null block, and every slot that nobody owns is full
    of large numbers, so that reading one shows.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(computed + new) // block_size) for computed, new in sequences]
    blocks = torch.randperm(sum(counts), generator=generator).numpy() + 1
    spec = LayerSpec("layer", heads.num_kv_heads * heads.group, heads.num_kv_heads, heads.key_dim, heads.value_dim)
    cache = KVCache(
        [spec], group_layers([spec]), num_blocks=len(blocks), block_size=block_size, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip
    layer = cache.layers[0]
    for rows in (layer.keys_NKD, layer.values_NKV):
        rows.copy_(1e4 * torch.randn(rows.shape, generator=generator))
    tables = np.zeros((len(sequences), max(counts)), dtype=np.int32)
    contexts, new_keys, new_values, first = [], [], [], 0
    for row, ((computed, new), count) in enumerate(zip(sequences, counts, strict=True)):
        own = blocks[first : first + count]
        first += count
        length = computed + new
        keys = torch.randn(length, heads.num_kv_heads, heads.key_dim, generator=generator).to(dtype)
        values = torch.randn(length, heads.num_kv_heads, heads.value_dim, generator=generator).to(dtype)
        places = np.arange(length)
        layer.write(torch.from_numpy(own[places // block_size] * block_size + places % block_size), keys, values)
        tables[row, :count] = own
        tables[row, : visibility.first_visible(computed) // block_size] = 0
        contexts.append((keys, values))
        new_keys.append(keys[computed:])
        new_values.append(values[computed:])
    num_tokens = np.array([new for _, new in sequences])
    layout = StepLayout(
        np.array([computed for computed, _ in sequences]), num_tokens, np.concatenate([[0], np.cumsum(num_tokens)])
    )
    query = torch.randn(int(num_tokens.sum()), spec.num_heads, heads.key_dim, generator=generator).to(dtype)
    return Step(layout, tables, layer, query, torch.cat(new_keys), torch.cat(new_values), contexts)


def random_bias(num_heads: int, num_distances: int, seed: int = 0) -> Tensor | None:
    """[H, N], or none for no distances."""
    if not num_distances:
        return None
    return torch.randn(num_heads, num_distances, generator=torch.Generator().manual_seed(seed))


def attention_by_hand(step: Step, visibility: Visibility, params: AttentionParams) -> Tensor:
    """Softmax attention in Python's own floats, one query and head at a time: [T, H, V] float64."""
    outputs, token = [], 0
    for (keys, values), computed in zip(step.contexts, step.layout.num_computed.tolist(), strict=True):
        group = step.query.shape[1] // keys.shape[1]
        for position in range(computed, len(keys)):
            rows = []
            for head, query in enumerate(step.query[token].double()):
                seen = range(visibility.first_visible(position), position + 1)
                logits = [float(query @ keys[place, head // group].double()) * params.scale for place in seen]
                if params.softcap is not None:
                    logits = [params.softcap * math.tanh(logit / params.softcap) for logit in logits]
                if params.bias_HN is not None:
                    most = params.bias_HN.shape[1] - 1
                    biases = (float(params.bias_HN[head, min(position - place, most)]) for place in seen)
                    logits = [logit + bias for logit, bias in zip(logits, biases, strict=True)]
                sink = [] if params.sinks_H is None else [float(params.sinks_H[head])]
                highest = max(logits + sink)
                total = sum(math.exp(logit - highest) for logit in logits + sink)
                weights = [math.exp(logit - highest) / total for logit in logits]
                rows.append(
                    sum(
                        weight * values[place, head // group].double()
                        for weight, place in zip(weights, seen, strict=True)
                    )
                )
            outputs.append(torch.stack(rows))  # type: ignore[arg-type]
            token += 1
    return torch.stack(outputs)
