"""Where a rank stands among those that share a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from shardwright.layers.collectives import Collectives
    from shardwright.plans.links import StageLink


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """One of `tp * pp` ranks. Those of a pipeline stage are neighbours: rank = stage * tp + tp_rank."""

    rank: int = 0
    tp: int = 1
    pp: int = 1
    gpu: int = 0
    """The number of its GPU among those that its process sees, if ranks are on GPUs."""
    num_local: int = 1
    """Ranks on this machine, those of other replicas among them: they share its cores and its memory."""

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    @property
    def stage(self) -> int:
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def samples(self) -> bool:
        """Whether this rank turns logits into tokens: one of the last stage does."""
        return self.is_last_stage and self.tp_rank == 0


ALONE = Placement()
"""A model of one rank."""


class Peers(Protocol):
    """The other ranks that share the model."""

    @property
    def stage(self) -> Collectives:
        """Those of the same pipeline stage."""
        ...

    @property
    def source(self) -> StageLink | None:
        """From the stage before; None at the first."""
        ...

    @property
    def target(self) -> StageLink | None:
        """To the next stage; None at the last."""
        ...

    def agree(self, value: bool) -> bool:
        """Whether all ranks say yes. Every rank asks the same questions in the same order."""
        ...
