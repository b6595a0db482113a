"""What a step computes, as arrays, and what a model must offer to compute it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from shardwright.adapt.rungs import AttentionRung
from shardwright.cache.spec import CacheGroup, LayerSpec

Ints = npt.NDArray[np.int64]
Tables = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTables:
    """One step: sequence i of S computes `num_tokens[i]` tokens of row `rows[i]`, from `num_computed[i]` on."""

    token_rows: Tables
    """[max rows, max_model_len]: all tokens known of each row."""
    block_tables: list[Tables]
    """Per cache group, [max rows, max blocks]."""
    rows: Ints
    """[S]."""
    num_computed: Ints
    """[S]."""
    num_tokens: Ints
    """[S]."""
    logits_rows: Ints
    """[R]: places in the packed tokens, one sequence after another, whose next-token logits are wanted;
    ascending."""

    def of(self, i: int, wanted: Ints) -> StepTables:
        """The step of sequence i alone.

        Args:
            i: which of the sequences of this step.
            wanted: [R] places among its tokens of this step whose next-token logits are wanted.
        """
        one = slice(i, i + 1)
        return replace(
            self,
            rows=self.rows[one],
            num_computed=self.num_computed[one],
            num_tokens=self.num_tokens[one],
            logits_rows=wanted,
        )


class StepModel(Protocol):
    """A model with its cache, ready for steps."""

    rung: AttentionRung
    rung_reason: str
    layers: list[LayerSpec]
    """Its attention calls, where they are ours."""
    groups: list[CacheGroup]
    max_step_tokens: int | None
    """Most tokens that one step may have; None: as many as there are."""
    takes_chunks: bool
    """Whether a prompt may come in pieces."""
    reuses_prefixes: bool
    """Whether a prompt may begin after a prefix that another one computed."""
    can_rewind: bool
    """Whether tokens may be computed that turn out not to follow: what is computed in their place comes out as if they
    had never been, and so do the logits before them."""

    @property
    def bytes_per_row(self) -> int:
        """Memory that a running sequence takes whatever its length; known once steps have run."""
        ...

    def bytes_per_block(self, block_size: int) -> int:
        """Memory of `block_size` tokens of one sequence, over all lanes."""
        ...

    def allocate(self, *, num_rows: int, num_blocks: int, block_size: int) -> None:
        """Make room for the cache of as many sequences and blocks; what was kept before is lost."""
        ...

    def compute(self, step: StepTables) -> Tensor:
        """Run the step. Returns [R, vocab_size] logits, model dtype."""
        ...

    def release(self, rows: list[int]) -> None:
        """Forget what is kept for rows whose sequences left."""
        ...

    def scrub(self, blocks: list[Ints]) -> None:
        """Make blocks (per group) harmless whose content is not finite."""
        ...


def ranges(starts: Ints, counts: Ints) -> Ints:
    """The numbers from each start on, as many as each count says, one range after another."""
    numbers: Ints = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return numbers


def wanted_places(step: StepTables) -> list[Ints]:
    """Per sequence, which of its tokens of this step have their logits wanted."""
    ends = np.cumsum(step.num_tokens)
    parts = np.split(step.logits_rows, np.searchsorted(step.logits_rows, ends[:-1]))
    return [part - start for part, start in zip(parts, (ends - step.num_tokens).tolist(), strict=True)]
