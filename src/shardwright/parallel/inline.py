"""The executor of a model of one rank: a worker in this process."""

from __future__ import annotations

from collections import deque

from shardwright.config import EngineConfig
from shardwright.parallel.merge import log_start, merge
from shardwright.worker.batch import Batch, StepResult
from shardwright.worker.placement import Placement
from shardwright.worker.worker import Worker


class InlineExecutor:
    """Carries out a batch when it is submitted.

    Args:
        config: of the engine.

    Raises: a UsageError for models, weights and options that do not work.
    """

    max_in_flight = 1
    runs_ahead = False

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._worker = Worker(config, Placement(num_local=config.parallel.data_parallel_size))
        merged = merge(config, [self._worker.report])
        self._allocation = merged.allocation
        self._worker.allocate(merged.allocation)
        self._results: deque[StepResult] = deque()
        self.info = merged.info
        self.groups = merged.allocation.groups
        log_start(self.info, config, load_s=self._worker.report.load_s, ready_s=self._worker.report.ready_s)

    def submit(self, batch: Batch) -> None:
        """Run a step."""
        result = self._worker.execute(batch)
        assert result is not None
        self._results.append(result)

    def collect(self) -> StepResult:
        """The result of the oldest step that has not been collected."""
        return self._results.popleft()

    def restart(self) -> None:
        """Forget all running sequences: what is cached of them is lost."""
        self._results.clear()
        self._worker.allocate(self._allocation)

    def close(self) -> None:
        """Nothing to do: what is here ends with the process."""
