"""The engine's step: schedule, execute, update."""

from __future__ import annotations

from typing import Protocol

from shardwright.cache.spec import CacheGroup
from shardwright.config import EngineConfig
from shardwright.engine.limits import SchedulerLimits
from shardwright.engine.messages import EngineInfo, EngineOutput, EngineOutputs, EngineRequest, SchedulerStats
from shardwright.engine.recovery import Recovery
from shardwright.engine.scheduler import Scheduler
from shardwright.engine.speculation import open_speculation
from shardwright.errors import RanksLostError, StepFailedError
from shardwright.worker.batch import Batch, StepResult


class Executor(Protocol):
    """Carries out batches on one rank or many; every rank gets them in the same order."""

    info: EngineInfo
    groups: list[CacheGroup]
    max_in_flight: int
    """Batches it can work on at the same time."""
    runs_ahead: bool
    """Whether a batch may compute tokens that batches in flight before it sample."""

    def submit(self, batch: Batch) -> None:
        """Take a batch; at most `max_in_flight` at a time.

        Raises: RanksLostError if ranks are gone. After any other error the batch counts as never submitted; where some
            ranks have got it all the same, the next call raises RanksLostError.
        """
        ...

    def collect(self) -> StepResult:
        """The result of the oldest batch.

        Raises: RanksLostError; StepFailedError from what a batch raised, after which all that were in flight count as
            never submitted. After any other error the result may be asked for again.
        """
        ...

    def restart(self) -> None:
        """Start all ranks anew, with empty caches of the sizes that `info` has; no batch is in flight afterwards.

        Raises: what starting raised; RanksLostError if ranks are lost again.
        """
        ...

    def close(self) -> None:
        """End all ranks. May be called twice."""
        ...


class EngineCore:
    """Requests in, tokens out, one step at a time.

    Args:
        config: of the engine.
        executor: carries out batches; closed with the core.
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
                max_in_flight=executor.max_in_flight,
                runs_ahead=executor.runs_ahead,
                enable_chunked_prefill=config.scheduler.enable_chunked_prefill and info.takes_chunks,
                enable_prefix_caching=config.cache.enable_prefix_caching and info.reuses_prefixes,
                by_priority=config.scheduler.scheduling_policy == "priority",
            ),
            executor.groups,
            open_speculation(config.speculative, info),
        )
        self._recovery = Recovery(executor, self.scheduler)

    @classmethod
    def from_config(cls, config: EngineConfig) -> EngineCore:
        """An engine with its ranks where the configuration says. Raises what they raise at start."""
        from shardwright.parallel.launch import start_executor

        return cls(config, start_executor(config))

    @property
    def has_work(self) -> bool:
        return self.scheduler.num_unfinished > 0 or len(self.scheduler.in_flight) > 0

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
        """Keep the executor busy, and take in the result of the oldest batch. Raises EngineDeadError if ranks were lost
        for good.
        """
        outputs: list[EngineOutput] = []
        try:
            self._submit()
            if self.scheduler.in_flight:
                outputs = self.scheduler.update(self.executor.collect())
        except RanksLostError as loss:
            self._recovery.recover(loss)
        except StepFailedError as failure:
            while self.scheduler.in_flight:
                self.scheduler.take_back()
            raise failure.error from None
        return EngineOutputs(outputs=outputs, stats=self.scheduler.stats())

    def close(self) -> None:
        """End the ranks. The core cannot be used afterwards."""
        self.executor.close()

    def _submit(self) -> None:
        """Give the executor as many batches as it can work on."""
        while len(self.scheduler.in_flight) < self.executor.max_in_flight:
            batch = self.scheduler.schedule()
            if not batch.rows:
                return
            try:
                self.executor.submit(batch)
            except RanksLostError:
                raise
            except BaseException:
                self.scheduler.take_back()
                raise
