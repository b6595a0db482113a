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

NO_LIMIT = 1 << 20
"""A tokenizer's limit from here on stands for none."""

LIMITS = (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length"))
"""Files that may say how long the texts were that a model was trained on."""


def longest_text(asked: int | None, module: nn.Module, config: PretrainedConfig, path: Path) -> int:
    """Most tokens of a text.

    Args:
        asked: by the user.
        module, config: of the model.
        path: its directory.

    Raises: ConfigError if more is asked for than the module has positions.
    """
    positions = usable_positions(module, config)
    if asked is not None:
        if positions is not None and asked > positions:
            raise ConfigError(f"max_model_len is {asked:,} but the model has {positions:,} positions: lower it")
        return asked
    limits = (positions, *(read_limit(path / file, key) for file, key in LIMITS))
    return min((limit for limit in limits if limit is not None), default=DEFAULT_LENGTH)


def usable_positions(module: nn.Module, config: PretrainedConfig) -> int | None:
    """Longest text that a module has positions for; None if its config does not say.

    Tables of positions in the manner of RoBERTa have a row for padding, and count from behind it.
    """
    positions = max_positions(config)
    for name, table in module.named_modules():
        if isinstance(table, nn.Embedding) and "position" in name and table.padding_idx is not None:
            return min(positions or table.num_embeddings, table.num_embeddings) - table.padding_idx - 1
    return positions


def read_limit(file: Path, key: str) -> int | None:
    """A number of tokens in a JSON file; None if it does not say."""
    try:
        limit = json.loads(file.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return int(limit) if isinstance(limit, (int, float)) and 0 < limit < NO_LIMIT else None
