"""Random steps over a paged cache, and attention computed by hand to judge them by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shardwright.attention.kv_cache import KVCache, LayerCache
from shardwright.attention.latent import LatentProjection
from shardwright.attention.layout import AttentionBackend, AttentionParams, StepLayout
from shardwright.cache.spec import LayerSpec, Visibility, group_layers

Drawn = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""What is cached as keys and values of some tokens, and their keys and values."""


@dataclass(frozen=True)
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
    projection: LatentProjection | None = None
    """If the cache holds latents."""

    def run(self, backend: AttentionBackend, visibility: Visibility, params: AttentionParams) -> Tensor:
        plan = backend.prepare(self.layout, self.block_tables, visibility)
        arguments = self.query, self.key, self.value, self.layer, plan, params
        if self.projection is not None:
            return backend.forward_latent(*arguments, self.projection)
        return backend.forward(*arguments)


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
    spec = LayerSpec("layer", heads.num_kv_heads * heads.group, heads.num_kv_heads, heads.key_dim, heads.value_dim)

    def draw(length: int, generator: torch.Generator) -> Drawn:
        keys = torch.randn(length, heads.num_kv_heads, heads.key_dim, generator=generator).to(dtype)
        values = torch.randn(length, heads.num_kv_heads, heads.value_dim, generator=generator).to(dtype)
        return (keys, values), (keys, values)

    return _make_step(sequences, spec, heads, draw, None, block_size, visibility, dtype, seed)


def make_latent_step(
    sequences: list[tuple[int, int]],
    projection: LatentProjection,
    *,
    group: int,
    block_size: int,
    visibility: Visibility,
    seed: int = 0,
) -> Step:
    """As `make_step`, of a layer that caches latents; its keys and values are computed here, number by number."""
    num_kv_heads, own_dim, latent_dim = projection.up_key_KNR.shape
    value_dim, dtype = projection.up_value_KVR.shape[1], projection.up_key_KNR.dtype
    heads = Heads(num_kv_heads, group, own_dim + projection.num_shared, value_dim)
    spec = LayerSpec("layer", num_kv_heads * group, 1, projection.row_dim, latent_dim, values_in_keys=True)
    own = [dim for dim in range(heads.key_dim) if not projection.shared.start <= dim < projection.shared.stop]

    def draw(length: int, generator: torch.Generator) -> Drawn:
        rows = torch.randn(length, projection.row_dim, generator=generator).to(dtype)
        latents, shared = rows[:, :latent_dim].double(), rows[:, latent_dim:]
        keys = torch.empty(length, num_kv_heads, heads.key_dim, dtype=dtype)
        values = torch.empty(length, num_kv_heads, value_dim, dtype=dtype)
        for head in range(num_kv_heads):
            for place, dim in enumerate(own):
                keys[:, head, dim] = (latents * projection.up_key_KNR[head, place].double()).sum(-1).to(dtype)
            for dim in range(value_dim):
                values[:, head, dim] = (latents * projection.up_value_KVR[head, dim].double()).sum(-1).to(dtype)
            keys[:, head, projection.shared] = shared
        return (rows[:, None], rows[:, None, :latent_dim]), (keys, values)

    return _make_step(sequences, spec, heads, draw, projection, block_size, visibility, dtype, seed)


def random_projection(
    num_kv_heads: int, own_dim: int, shared: slice, value_dim: int, latent_dim: int, dtype: torch.dtype = torch.float32
) -> LatentProjection:
    """A projection that keeps numbers at about their size."""
    generator = torch.Generator().manual_seed(7)
    up_key = torch.randn(num_kv_heads, own_dim, latent_dim, generator=generator) / latent_dim**0.5
    up_value = torch.randn(num_kv_heads, value_dim, latent_dim, generator=generator) / latent_dim**0.5
    return LatentProjection(up_key.to(dtype), up_value.to(dtype), shared)


def _make_step(
    sequences: list[tuple[int, int]],
    spec: LayerSpec,
    heads: Heads,
    draw: Callable[[int, torch.Generator], Drawn],
    projection: LatentProjection | None,
    block_size: int,
    visibility: Visibility,
    dtype: torch.dtype,
    seed: int,
) -> Step:
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(computed + new) // block_size) for computed, new in sequences]
    blocks = torch.randperm(sum(counts), generator=generator).numpy() + 1
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
        places = np.arange(computed + new)
        cached, (keys, values) = draw(computed + new, generator)
        layer.write(torch.from_numpy(own[places // block_size] * block_size + places % block_size), *cached)
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
    return Step(layout, tables, layer, query, torch.cat(new_keys), torch.cat(new_values), contexts, projection)


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
