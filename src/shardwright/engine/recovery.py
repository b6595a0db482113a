"""Going on after ranks were lost. The engine owns the tokens, so all that is lost is work: keys, values, and steps in
flight.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from shardwright.engine.scheduler import Scheduler
from shardwright.errors import EngineDeadError, RanksLostError, ShardwrightError

if TYPE_CHECKING:
    from shardwright.engine.core import Executor

logger = logging.getLogger(__name__)

MAX_LOSSES = 3
"""Losses with no token in between, after which the engine gives up: the next start would end like the last."""


class Recovery:
    """Starts lost ranks anew and lets their requests go on, for as long as that gets anywhere.

    Args:
        executor: whose ranks may be lost.
        scheduler: of the same engine.
    """

    def __init__(self, executor: Executor, scheduler: Scheduler) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._num_losses = 0
        self._num_tokens = 0
        """Tokens generated when ranks were last lost."""

    def recover(self, loss: RanksLostError) -> None:
        """Start the ranks anew, which may take as long as the engine's start.

        Raises: EngineDeadError if they cannot be started, or were lost too often.
        """
        while True:
            self._count(loss)
            logger.warning("%s; starting all ranks anew, %d requests go on", loss, self._scheduler.num_unfinished)
            try:
                self._executor.restart()
            except RanksLostError as again:
                loss = again
            except ShardwrightError as exc:
                raise EngineDeadError(f"ranks could not be started anew: {exc} (why they had to: {loss})") from exc
            else:
                self._scheduler.start_over()
                return

    def _count(self, loss: RanksLostError) -> None:
        num_tokens = self._scheduler.num_generated_tokens
        self._num_losses = 1 if num_tokens > self._num_tokens else self._num_losses + 1
        self._num_tokens = num_tokens
        if self._num_losses >= MAX_LOSSES:
            raise EngineDeadError(
                f"ranks were lost {self._num_losses} times and no token was generated in between; the last time: {loss}"
            ) from loss
