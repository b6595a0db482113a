"""What becomes of the troubles of ranks."""

from __future__ import annotations

import pytest

from shardwright.config import EngineConfig
from shardwright.errors import ConfigError, RanksLostError
from shardwright.parallel.messages import Command, Failed
from shardwright.parallel.ranks import Ranks, Troubles


class ToldRanks(Ranks):
    """Ranks whose troubles come as they are told."""

    def __init__(self, num_ranks: int, troubles: list[Troubles]) -> None:
        super().__init__(num_ranks, step_timeout_s=1.0)
        self._troubles = troubles

    def close(self) -> None:
        pass

    def _deliver(self, command: Command) -> bool:
        return True

    def _receive(self, timeout_s: float) -> Troubles:
        return self._troubles.pop(0) if self._troubles else {}

    def _obituary(self, rank: int) -> str:
        return f"rank {rank} died"


CAUSE = Failed("OSError", "the disk is gone")
CONSEQUENCE = Failed("RuntimeError", "connection closed by peer")


@pytest.mark.parametrize(
    ("troubles", "reason"),
    [
        ([{1: CAUSE}, {0: CONSEQUENCE}], "rank 1 failed: the disk is gone"),
        ([{0: CAUSE}, {1: CONSEQUENCE}], "rank 0 failed: the disk is gone"),
        ([{1: CAUSE}, {1: None}, {0: CONSEQUENCE}], "rank 1 failed: the disk is gone"),  # having said so, it ended
        ([{0: CONSEQUENCE}, {1: None}], "rank 1 died"),
    ],
)
def test_the_reason_is_what_was_said_first_unless_a_rank_cannot_speak(troubles: list[Troubles], reason: str) -> None:
    ranks = ToldRanks(2, troubles)
    with pytest.raises(RanksLostError, match=f"^{reason}$"):
        ranks.collect()
    assert ranks.is_lost


def test_at_start_what_the_user_can_mend_comes_first() -> None:
    ranks = ToldRanks(2, [{1: CONSEQUENCE}, {0: Failed("ConfigError", "no room")}])
    with pytest.raises(ConfigError, match="^no room$"):
        ranks.load(EngineConfig.from_options("model"))
