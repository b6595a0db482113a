"""The engine's step for models that read whole texts: choose some that wait, read them, hand out the results."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from shardwright.engine.messages import EngineOutputs, PoolingOutput, PoolingRequest, SchedulerStats
from shardwright.pooling.batching import choose_batch

if TYPE_CHECKING:
    from shardwright.pooling.worker import PoolingWorker

WINDOW = 1024
"""Texts, oldest first, among which a batch is chosen."""


class PoolingCore:
    """Texts in, vectors out, one batch at a time.

    Args:
        worker: reads batches.
    """

    def __init__(self, worker: PoolingWorker) -> None:
        self.info = worker.info
        self._worker = worker
        self._waiting: dict[str, PoolingRequest] = {}  # oldest first
        self._num_steps = 0
        self._num_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_waiting=len(self._waiting), num_steps=self._num_steps, num_computed_tokens=self._num_tokens
        )

    def add(self, request: PoolingRequest) -> None:
        self._waiting[request.request_id] = request

    def abort(self, request_id: str) -> bool:
        return self._waiting.pop(request_id, None) is not None

    def reset_prefix_cache(self) -> None:
        """Nothing is kept between texts."""

    def nothing_new(self) -> EngineOutputs:
        """The state of the queue between steps."""
        return EngineOutputs(outputs=[], stats=self.stats)

    def close(self) -> None:
        """Nothing to end: what is here ends with the process."""

    def step(self) -> EngineOutputs:
        """Read one batch."""
        window = list(islice(self._waiting.values(), WINDOW))
        lengths = [len(request.prompt_token_ids) for request in window]
        places = choose_batch(
            lengths,
            self._worker.batching,
            max_texts=self.info.max_num_seqs,
            max_tokens=self.info.max_num_batched_tokens,
        )
        batch = [window[place] for place in places]
        vectors = self._worker.execute(batch).numpy()
        for request in batch:
            del self._waiting[request.request_id]
        self._num_steps += 1
        self._num_tokens += sum(lengths[place] for place in places)
        pooled = [PoolingOutput(one.request_id, row.tobytes()) for one, row in zip(batch, vectors, strict=True)]
        return EngineOutputs(outputs=[], stats=self.stats, pooled=pooled)
