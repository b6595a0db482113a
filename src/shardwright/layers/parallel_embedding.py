"""Embeddings of which every rank holds some rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shardwright.layers.parallel_module import Parallel
from shardwright.layers.parallel_pieces import Pieces


class VocabRows(Parallel):
    """Looks up ids of this rank's rows, gives zeros for all others, and adds up over the ranks.

    Goes in front of nn.Embedding or a subclass, whose own forward (a scale, say) is applied to this rank's rows.
    """

    row_pieces: Pieces
    """Of the vocabulary."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[...] ids to [..., embedding_dim]."""
        local, is_here = local_index(input, self.row_pieces, self.collectives.rank)
        rows: Tensor = super().forward(local, *args, **kwargs)
        return self.collectives.all_reduce(rows.masked_fill(~is_here.unsqueeze(-1), 0))


class VocabParallelEmbedding(VocabRows, nn.Embedding):
    """An nn.Embedding, some of whose rows are here."""


def local_index(index: Tensor, pieces: Pieces, rank: int) -> tuple[Tensor, Tensor]:
    """Indices into what a rank holds, of indices into the whole.

    Args:
        index: of any shape, integers.
        pieces: what ranks hold.
        rank: whose.

    Returns: the local indices, 0 for what is elsewhere, and whether each is here, both in the shape of `index`.
    """
    local = torch.zeros_like(index)
    is_here = torch.zeros_like(index, dtype=torch.bool)
    before = 0
    for start, stop in pieces.ranges[rank]:
        within = (index >= start) & (index < stop)
        local = torch.where(within, index - start + before, local)
        is_here |= within
        before += stop - start
    return local, is_here
