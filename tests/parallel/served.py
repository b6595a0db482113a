"""Engines on shared ranks: starting a process costs seconds, so tests let the same ones serve several models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shardwright import SamplingParams
from shardwright.config import EngineConfig
from shardwright.engine.core import EngineCore
from shardwright.engine.messages import EngineRequest
from shardwright.parallel.executor import ParallelExecutor
from shardwright.parallel.ranks import Ranks

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = [[5, 9, 33, 7, 21], [40 + 3 * i for i in range(17)], [100, 4, 4, 101]]


def make_config(path: Path, tp: int = 1, pp: int = 1, backend: str = "auto", **options: Any) -> EngineConfig:
    """A small float32 engine."""
    fixed = {"dtype": "float32", "block_size": 4, "max_num_seqs": 4, "kv_cache_memory_bytes": 16 << 20}
    return EngineConfig.from_options(
        str(path),
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        distributed_executor_backend=backend,
        trust_remote_code=True,
        **(fixed | options),
    )


def add(core: EngineCore, prompts: Sequence[list[int]], params: SamplingParams = GREEDY) -> None:
    """Queue prompts under their numbers."""
    for number, prompt in enumerate(prompts):
        core.add(EngineRequest(request_id=str(number), prompt_token_ids=prompt, sampling_params=params))


def run(core: EngineCore) -> dict[str, list[int]]:
    """Run what is queued to its end. Returns: tokens by request id."""
    tokens: dict[str, list[int]] = {}
    while core.has_work:
        for output in core.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    return tokens


def generate(
    core: EngineCore, prompts: Sequence[list[int]] = PROMPTS, params: SamplingParams = GREEDY
) -> list[list[int]]:
    """Tokens of prompts that run together."""
    add(core, prompts, params)
    tokens = run(core)
    return [tokens[str(number)] for number in range(len(prompts))]


class SharedRanks:
    """Ranks of one shape that serve one model after the other; new ones if they were lost.

    Args:
        start: makes ranks for a configuration.
    """

    def __init__(self, start: Callable[[EngineConfig], Ranks]) -> None:
        self._start = start
        self._ranks: Ranks | None = None

    def serve(self, config: EngineConfig) -> EngineCore:
        """An engine on the ranks, to be left open; the one before is of no use any more."""
        return EngineCore(config, ParallelExecutor(config, lambda: self.ranks_for(config)))

    def ranks_for(self, config: EngineConfig) -> Ranks:
        """The ranks, without a model, or with another."""
        if self._ranks is None or self._ranks.is_lost:
            self._ranks = self._start(config)
        return self._ranks

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
