"""What has to be known of a module before it can be served: vocabulary, longest sequence, number of layers.

Transformers models say so in their config. A plain module may say it anywhere, or nowhere, so it is looked for in what
was said beside it, then in a pass of a few tokens (adapt/observe.py), then among attributes and tables. The result has
the form of a Transformers config, so that nobody else has to know the difference.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from shardwright.adapt.observe import Observation, observe
from shardwright.errors import UnsupportedModelError

MOST_TOKENS = 4096
"""Modules that take as many are not asked for their limit."""

FEW_TOKENS = 13
"""A number that is unlikely to be a size of the model."""

PATIENCE_S = 1.0
"""How long one pass that looks for the limit may take: layers that go from token to token are slow on "meta" too."""

STRIDE = 8
"""Factor from one number of tokens to the next in the search for the limit."""

MOST_PARAMETERS = 1_000_000_000
"""A larger module is not run with zeros for weights."""

MOST_TRIED_PARAMETERS = 20_000_000
"""A larger module is not run with zeros for weights, only to see how many tokens it takes,"""

MOST_TRIED_TOKENS = 1024
"""nor one of any size on more tokens."""

_HOLDERS = ("config", "cfg", "args", "hparams", "params", "model_args", "model_config")
_VOCAB = ("vocab_size", "n_vocab", "num_tokens", "vocabulary_size", "padded_vocab_size")
_POSITIONS = (
    "max_position_embeddings", "n_positions", "block_size", "max_seq_len", "max_sequence_length", "context_length",
    "n_ctx", "ctx_len", "sequence_length", "seq_length", "seq_len", "max_length", "max_len", "context_size",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")


class CustomConfig(PretrainedConfig):
    """What is known of a module without a config of its own."""

    model_type = "custom"


def describe(
    module: nn.Module,
    *,
    vocab_size: int | None = None,
    max_model_len: int | None = None,
    num_layers: int | None = None,
    eos_token_ids: int | Iterable[int] | None = None,
) -> PretrainedConfig:
    """The module's config, or one made of what can be found out; arguments are what is known already.

    Raises: UnsupportedModelError if its vocabulary cannot be told, or is not the one given.
    """
    if isinstance(module, PreTrainedModel):
        return module.config
    seen = on_meta = observe(module, FEW_TOKENS)
    if isinstance(on_meta, Exception) and sum(p.numel() for p in module.parameters()) <= MOST_PARAMETERS:
        seen = observe(module, FEW_TOKENS, on_meta=False)
    found = seen.vocab_size if isinstance(seen, Observation) else None
    if vocab_size is not None and found is not None and found != vocab_size:
        raise UnsupportedModelError(
            f"its vocabulary is said to be {vocab_size:,}, but its forward gives {found:,} logits for a token"
        )
    vocab_size = vocab_size or found or _attribute(module, _VOCAB) or _vocab_of_tables(module)
    if vocab_size is None:
        raise UnsupportedModelError(
            f"the vocabulary of {type(module).__name__} cannot be told: its forward fails on {FEW_TOKENS} token ids "
            f"({type(seen).__name__}: {seen}): if it takes token ids, give it an attribute vocab_size"
        )
    eos = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids or ())
    facts: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_position_embeddings": _limit(
            module, max_model_len or _attribute(module, _POSITIONS), seen, runs_on_meta=seen is on_meta
        ),
        "num_hidden_layers": num_layers or count_layers(module),
        "eos_token_id": eos or None,
    }
    return CustomConfig(**facts)


def _limit(module: nn.Module, known: int | None, seen: Observation | Exception, *, runs_on_meta: bool) -> int | None:
    """Most tokens that the module takes: what is known, what its tables have room for, what runs."""
    if isinstance(seen, Exception):
        return known or _rows_of_position_tables(module)
    limit = min([*([known] if known else []), *seen.position_rows], default=None)
    if runs_on_meta:
        limit = _limit_on_meta(module, limit)
    # Rows past the end of a table are looked up on "meta" without complaint.
    tried = min(limit or MOST_TOKENS, MOST_TRIED_TOKENS)
    is_small = sum(p.numel() for p in module.parameters()) <= MOST_TRIED_PARAMETERS
    if is_small and tried > FEW_TOKENS and isinstance(observe(module, tried, on_meta=False), Exception):
        return _last_that_runs(module, FEW_TOKENS, tried, on_meta=False)
    return limit


def _limit_on_meta(module: nn.Module, limit: int | None) -> int | None:
    low, high, elapsed_s = FEW_TOKENS, FEW_TOKENS, 0.0
    while low < (limit or MOST_TOKENS) and elapsed_s < PATIENCE_S / STRIDE:
        high, started = min(low * STRIDE, limit or MOST_TOKENS), time.perf_counter()
        if isinstance(observe(module, high), Exception):
            return _last_that_runs(module, low, high)
        low, elapsed_s = high, time.perf_counter() - started
    return limit


def _last_that_runs(module: nn.Module, low: int, high: int, *, on_meta: bool = True) -> int:
    """Most tokens that run, where `high` do not; `low` if none do that are more."""
    while high - low > 1:
        middle = (low + high) // 2
        fails = isinstance(observe(module, middle, on_meta=on_meta), Exception)
        low, high = (low, middle) if fails else (middle, high)
    return low


def _attribute(module: nn.Module, names: Iterable[str]) -> int | None:
    """The first of these attributes that is a positive number, of the module or a record of settings that it holds."""
    records = [module, *(record for name in _HOLDERS if (record := getattr(module, name, None)) is not None)]
    for name in names:
        for record in records:
            value = record.get(name) if isinstance(record, dict) else getattr(record, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _vocab_of_tables(module: nn.Module) -> int | None:
    """Rows of the embedding that some linear gives as many outputs as, or of the first embedding."""
    rows = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    widths = {m.out_features for m in module.modules() if isinstance(m, nn.Linear)}
    return next((n for n in rows if n in widths), rows[0] if rows else None)


def _rows_of_position_tables(module: nn.Module) -> int | None:
    """Rows of the shortest embedding that is as wide as the first and is not the vocabulary's."""
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    vocab_size = _vocab_of_tables(module)
    rows = [t.num_embeddings for t in tables if t.embedding_dim == tables[0].embedding_dim]
    return min((n for n in rows if n != vocab_size), default=None)


def count_layers(module: nn.Module) -> int | None:
    """The number that the module or its settings name; else how many blocks of one class stand side by side, where
    there are the most of them nearest to the top.
    """
    if (named := _attribute(module, _LAYERS)) is not None:
        return named
    level = [module]
    while level:
        counts = []
        for owner in level:
            kinds = [type(child) for child in owner.children() if next(child.children(), None) is not None]
            counts += [kinds.count(kind) for kind in set(kinds)]
        if max(counts, default=0) > 1:
            return max(counts)
        level = [child for owner in level for child in owner.children()]
    return None
