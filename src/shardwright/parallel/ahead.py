"""An executor that works beside its caller, who plans the next batch meanwhile."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from shardwright.errors import StepFailedError
from shardwright.parallel.inline import InlineExecutor
from shardwright.worker.batch import Batch, StepResult


class AheadExecutor:
    """Carries out batches in a thread, one after another. Its one rank knows each sampled token when it comes to the
    next batch, so that may be planned before anybody else does.

    Args:
        executor: that carries them out; closed with this one.
    """

    max_in_flight = 2
    runs_ahead = True

    def __init__(self, executor: InlineExecutor) -> None:
        self.info = executor.info
        self.groups = executor.groups
        self._executor = executor
        self._steps: deque[Future[StepResult]] = deque()
        self._error: BaseException | None = None
        """Why steps are not carried out any more, until `collect` has told."""
        device = torch.cuda.current_device() if self.info.device.startswith("cuda") else None
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="steps", initializer=_settle, initargs=(torch.get_num_threads(), device)
        )

    def submit(self, batch: Batch) -> None:
        """Take a batch."""
        self._steps.append(self._thread.submit(self._carry_out, batch))

    def collect(self) -> StepResult:
        """The result of the oldest batch. Raises StepFailedError if there is none: then no batch is in flight."""
        error = self._steps[0].exception()  # waits; Ctrl-C leaves all as it is
        if error is None:
            return self._steps.popleft().result()
        self._drop()
        raise StepFailedError(error)

    def restart(self) -> None:
        """Forget all running sequences: what is cached of them is lost."""
        self._drop()
        self._executor.restart()

    def close(self) -> None:
        """Wait for what is being carried out, and end the thread."""
        self._thread.shutdown()
        self._executor.close()

    def _carry_out(self, batch: Batch) -> StepResult:
        if self._error is not None:
            raise self._error
        try:
            self._executor.submit(batch)
            return self._executor.collect()
        except BaseException as exc:
            self._error = exc  # what comes after it hangs on its tokens
            raise

    def _drop(self) -> None:
        """Wait for all batches, and forget what became of them."""
        for step in self._steps:
            step.exception()
        self._steps.clear()
        self._error = None


def _settle(num_threads: int, device: int | None) -> None:
    """Make the calling thread use as many threads, and the GPU, as the one that loaded the model."""
    torch.set_num_threads(num_threads)
    if device is not None:
        torch.cuda.set_device(device)
