"""Tensor-parallel styles: what a plan's word says about a module's parameters, its input and its output.

The words are those of Transformers v5, and of v4 as aliases; a style is what they mean for inference, so words that
differ only in training (gradients) are one style here.

Source: Transformers, `distributed/tensor_parallel.py` and `distributed/expert_parallel.py` (v5),
`integrations/tensor_parallel.py` (v4).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import StrEnum

from shardwright.errors import PlanError


class Cut(StrEnum):
    """Which part of a parameter a rank holds."""

    NONE = "none"
    """All of it."""
    COLUMNS = "columns"
    """Its output features."""
    PACKED_COLUMNS = "packed columns"
    """Its output features, of which two or more kinds (gate and up; query, key and value) lie one after another."""
    ROWS = "rows"
    """Its input features."""
    PACKED_ROWS = "packed rows"
    """The last dimension, in which two kinds of features lie one after another."""
    VOCABULARY = "vocabulary"
    """The rows of an embedding."""
    EMBEDDING = "embedding"
    """The features of an embedding."""
    EXPERTS = "experts"
    """Its first dimension, one entry an expert."""


class Input(StrEnum):
    """What a module is given."""

    SAME = "same"
    """What it was given before it was cut: all of it, or the part that the module before it left on this rank."""
    SPLIT = "split"
    """All of it, of which it takes this rank's part."""


class Output(StrEnum):
    """What becomes of a module's output."""

    SAME = "same"
    """It stays on its rank, whole or a part."""
    GATHERED = "gathered"
    """Parts of the last dimension are put together on every rank."""
    SUMMED = "summed"
    """Partial sums are added up on every rank."""


@dataclass(frozen=True, slots=True)
class Style:
    """One word of a plan.

    Two styles are equal if they mean the same.
    """

    name: str
    cut: Cut = Cut.NONE
    input: Input = Input.SAME
    output: Output = Output.SAME

    @property
    def is_column(self) -> bool:
        """Whether it cuts output features."""
        return self.cut in (Cut.COLUMNS, Cut.PACKED_COLUMNS)

    @property
    def is_row(self) -> bool:
        """Whether it cuts input features, so that outputs are partial sums."""
        return self.cut is Cut.ROWS


COLUMN = Style("colwise", Cut.COLUMNS)
COLUMN_GATHERED = Style("colwise_gather_output", Cut.COLUMNS, output=Output.GATHERED)
PACKED_COLUMN = Style("packed_colwise", Cut.PACKED_COLUMNS)
ROW = Style("rowwise", Cut.ROWS, output=Output.SUMMED)
ROW_SPLIT = Style("rowwise_split_input", Cut.ROWS, Input.SPLIT, Output.SUMMED)
PACKED_ROW = Style("packed_rowwise", Cut.PACKED_ROWS)
LOCAL_ROW = Style("local_rowwise", Cut.ROWS)
VOCABULARY = Style("embedding_rowwise", Cut.VOCABULARY, output=Output.SUMMED)
EMBEDDING = Style("embedding_colwise", Cut.EMBEDDING, output=Output.GATHERED)
REPLICATE = Style("replicate")
SUM = Style("all_reduce", output=Output.SUMMED)
IDENTITY_EXPERT = Style("moe_identity_expert")
"""An expert that returns its input on every rank: to be divided by the number of ranks before it is summed."""
EXPERTS = Style("grouped_gemm", Cut.EXPERTS)
DISPATCH = Style("ep_dispatch_experts", output=Output.SUMMED)
"""A module of cut experts: choices of experts elsewhere are masked."""
ROUTER = Style("ep_router")
"""A router of cut experts (v4): its choices of experts elsewhere are masked."""

STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        COLUMN,
        COLUMN_GATHERED,
        PACKED_COLUMN,
        ROW,
        ROW_SPLIT,
        PACKED_ROW,
        LOCAL_ROW,
        VOCABULARY,
        EMBEDDING,
        REPLICATE,
        SUM,
        IDENTITY_EXPERT,
        EXPERTS,
        DISPATCH,
        ROUTER,
    )
}
"""By the name that reports and written plans use."""

ALIASES: dict[str, Style] = {
    "colwise_rep": COLUMN_GATHERED,
    "rowwise_rep": ROW_SPLIT,
    "local_colwise": COLUMN,
    "local_packed_colwise": PACKED_COLUMN,
    "local_packed_rowwise": PACKED_ROW,
    "gather": SUM,
    "moe_tp_experts": SUM,
    "local": REPLICATE,
    "local_params": REPLICATE,
    "replicated": REPLICATE,
    "sequence_parallel": REPLICATE,
    "replicated_with_grad_allreduce": REPLICATE,
    "mla_kv_a_proj": REPLICATE,
}
"""Other words for the same."""


def parse_style(word: str, *, where: str) -> Style:
    """The style that a plan's word names.

    Args:
        word: of a plan.
        where: the entry that holds it, for the message.

    Raises: PlanError naming the closest word there is.
    """
    known = STYLES | ALIASES
    if not isinstance(word, str) or word not in known:
        near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.0)
        raise PlanError(f"{where}: unknown style {word!r}; did you mean {near[0]!r}? Known are {', '.join(known)}")
    return known[word]
