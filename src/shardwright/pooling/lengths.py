"""How long a text may be: what the module has positions for, and what the model was trained to read."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from shardwright.errors import ConfigError
from shardwright.models.build import max_positions

DEFAULT_LENGTH = 4096
"""For models that name no limit."""

MOST_TOKENIZER_LENGTH = 1 << 20
"""A tokenizer's limit beyond this stands for none."""


def longest_text(
    asked: int | None, module: nn.Module, config: PretrainedConfig, path: Path, *, trained: int | None
) -> int:
    """Most tokens of a text.

    Args:
        asked: by the user.
        module, config: of the model.
        path: its directory, where the tokenizer may have a limit too.
        trained: what sentence-transformers' files say.

    Raises: ConfigError if more is asked for than the module has positions.
    """
    positions = usable_positions(module, config)
    if asked is not None:
        if positions is not None and asked > positions:
            raise ConfigError(f"max_model_len is {asked:,} but the model has {positions:,} positions: lower it")
        return asked
    limits = [limit for limit in (positions, trained, tokenizer_limit(path)) if limit is not None]
    return min(limits, default=DEFAULT_LENGTH)


def usable_positions(module: nn.Module, config: PretrainedConfig) -> int | None:
    """Longest text that a module has positions for; None if its config does not say.

    Tables of positions in the manner of RoBERTa have a row for padding, and count from behind it.
    """
    positions = max_positions(config)
    for name, table in module.named_modules():
        if isinstance(table, nn.Embedding) and "position" in name and table.padding_idx is not None:
            return min(positions or table.num_embeddings, table.num_embeddings) - table.padding_idx - 1
    return positions


def tokenizer_limit(path: Path) -> int | None:
    """Longest text that a directory's tokenizer was made for; None if it does not say."""
    try:
        limit = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8")).get("model_max_length")
    except (OSError, ValueError, AttributeError):
        return None
    return int(limit) if isinstance(limit, (int, float)) and 0 < limit < MOST_TOKENIZER_LENGTH else None
