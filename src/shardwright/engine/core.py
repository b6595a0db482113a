"""The engine's step: schedule, execute, update."""

from __future__ import annotations

from typing import Protocol

from shardwright.cache.spec import CacheGroup
from shardwright.config import EngineConfig
from shardwright.engine.messages import EngineInfo, EngineOutputs, EngineRequest, SchedulerStats
from shardwright.engine.scheduler import Scheduler, SchedulerLimits
from shardwright.worker.batch import Batch, StepResult


class Executor(Protocol):
    """Whatever carries out batches: a worker in this process, for now."""

    info: EngineInfo
    groups: list[CacheGroup]

    def execute(self, batch: Batch) -> StepResult: ...


class EngineCore:
    """Requests in, tokens out, one step at a time.

    Args:
        config: of the engine.
        executor: carries out batches.
    """

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        info = executor.info
        self.info = info
        self.executor = executor
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=info.max_num_seqs,
                max_num_batched_tokens=info.max_num_batched_tokens,
                max_model_len=info.max_model_len,
                block_size=info.block_size,
                num_blocks=info.num_blocks,
                enable_chunked_prefill=config.scheduler.enable_chunked_prefill and info.takes_chunks,
                enable_prefix_caching=config.cache.enable_prefix_caching and info.reuses_prefixes,
                by_priority=config.scheduler.scheduling_policy == "priority",
            ),
            executor.groups,
        )

    @classmethod
    def from_config(cls, config: EngineConfig) -> EngineCore:
        """An engine with its worker in this process. Raises what Worker raises."""
        from shardwright.worker.worker import Worker

        return cls(config, Worker(config))

    @property
    def has_work(self) -> bool:
        return self.scheduler.num_unfinished > 0

    @property
    def stats(self) -> SchedulerStats:
        return self.scheduler.stats()

    def add(self, request: EngineRequest) -> None:
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        return self.scheduler.abort(request_id)

    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()

    def nothing_new(self) -> EngineOutputs:
        """The state of the scheduler between steps."""
        return EngineOutputs(outputs=[], stats=self.scheduler.stats())

    def step(self) -> EngineOutputs:
        """Compute one batch."""
        batch = self.scheduler.schedule()
        outputs = self.scheduler.update(self.executor.execute(batch)) if batch.rows else []
        return EngineOutputs(outputs=outputs, stats=self.scheduler.stats())
