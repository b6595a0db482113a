"""Logits are found in whatever a forward returns, if it is clear which they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.adapt.logits import logits_of
from shardwright.errors import UnsupportedModelError

LOGITS, HIDDEN, LOSS = torch.ones(1, 3, 8), torch.zeros(1, 3, 4), torch.tensor(0.5)


@dataclass
class Record:
    hidden: Tensor
    lm_logits: Tensor


@dataclass
class Output:
    hidden: Tensor
    loss: Tensor | None = None


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        LOGITS[0],
        (LOGITS, None),
        [LOGITS, HIDDEN],
        (LOSS, LOGITS),
        {"logits": LOGITS, "hidden": HIDDEN},
        {"hidden": HIDDEN, "lm_logits": LOGITS},
        {"prediction": LOGITS, "loss": LOSS},
        Record(HIDDEN, LOGITS),
        Output(LOGITS),
    ],
    ids=range(10),
)
def test_they_are_found(output: Any) -> None:
    assert torch.equal(logits_of(output), LOGITS)


@pytest.mark.parametrize("output", [None, "tokens", {"a": HIDDEN, "b": LOGITS}, {"loss": LOSS}, Output(LOSS)])
def test_they_are_not_guessed(output: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="in which there are no logits"):
        logits_of(output)
