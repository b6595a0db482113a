"""A long sequence, and what the module's own forward pass gives at some places of it, to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_PLACES = 24
"""So many tokens of a sequence have their logits compared."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Tokens, and the logits of some of them."""

    tokens: npt.NDArray[np.int64]
    """[T]."""
    places: list[int]
    """[P], ascending: tokens whose logits are known."""
    logits: Tensor
    """[P, vocab]; [P, 0] of a pipeline stage that has no head."""

    @classmethod
    def of(cls, tokens: Tensor, logits: Tensor) -> Sample:
        """A sample of a forward pass.

        Args:
            tokens: [1, T] int64.
            logits: [T, vocab], or [1, vocab] of the last token alone.
        """
        length = tokens.shape[1]
        places = torch.linspace(0, length - 1, min(NUM_PLACES, length)).long().tolist()
        known = [length - 1] if len(logits) == 1 else places
        return cls(tokens[0].cpu().numpy(), known, logits[torch.tensor(known) - (length - len(logits))])
