"""The executor of a model on many ranks, wherever these run."""

from __future__ import annotations

import time
from collections.abc import Callable

from shardwright.config import EngineConfig
from shardwright.errors import RanksLostError
from shardwright.parallel.merge import log_start, merge
from shardwright.parallel.ranks import Ranks
from shardwright.worker.batch import Batch, StepResult


class ParallelExecutor:
    """Carries out batches on all ranks; as many at a time as there are pipeline stages.

    Args:
        config: of the engine.
        start: starts the ranks.

    Raises: a UsageError for models, weights and options that do not work; RanksLostError if a rank ends at start.
    """

    def __init__(self, config: EngineConfig, start: Callable[[], Ranks]) -> None:
        started = time.perf_counter()
        self.max_in_flight = config.parallel.pipeline_parallel_size
        self.runs_ahead = False  # ranks that do not sample learn of tokens from the batch after
        self._config = config
        self._start = start
        self._ranks = start()
        try:
            reports = self._ranks.load(config)
            merged = merge(config, reports)
            self._ranks.allocate(merged.allocation)
        except BaseException:
            self._ranks.close()
            raise
        self._allocation = merged.allocation
        self.info = merged.info
        self.groups = merged.allocation.groups
        load_s = max(report.load_s for report in reports)
        log_start(self.info, config, load_s=load_s, ready_s=time.perf_counter() - started)

    def submit(self, batch: Batch) -> None:
        """Send a batch to the ranks. Raises RanksLostError."""
        self._ranks.submit(batch)

    def collect(self) -> StepResult:
        """The result of the oldest batch. Raises RanksLostError if a rank died or hangs."""
        return self._ranks.collect()

    def restart(self) -> None:
        """End the ranks that are left, start others, with caches of the same size.

        Raises: what starting raised; RanksLostError if ranks are lost again, or find another model than before.
        """
        self._ranks.close()
        self._ranks = self._start()
        try:
            groups = merge(self._config, self._ranks.load(self._config)).allocation.groups
            if groups != self.groups:
                raise RanksLostError("ranks that were started anew have other layers: did the model's files change?")
            self._ranks.allocate(self._allocation)
        except BaseException:
            self._ranks.close()
            raise

    def close(self) -> None:
        """End all ranks. May be called twice."""
        self._ranks.close()
