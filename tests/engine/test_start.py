"""Which core a model gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.config import EngineConfig
from shardwright.engine.start import start_core
from shardwright.errors import ConfigError


@pytest.mark.parametrize("option", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_models_that_embed_are_not_cut(tiny_llama: Path, option: str) -> None:
    config = EngineConfig.from_options(str(tiny_llama), task="embed", **{option: 2})
    with pytest.raises(ConfigError, match="one rank does.*--data-parallel-size"):
        start_core(config)
