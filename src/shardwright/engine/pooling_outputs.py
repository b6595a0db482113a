"""From the numbers that a model gives for a text to those that a caller gets."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shardwright.engine.messages import PoolingInfo
from shardwright.errors import RequestError

Vector: TypeAlias = npt.NDArray[np.float32]


def check_dimensions(asked: int | None, pooling: PoolingInfo) -> int:
    """Numbers that an embedding shall have. Raises RequestError if the model's may not be cut to so many."""
    if asked is None or asked == pooling.size:
        return pooling.size
    allowed = pooling.dimensions
    if allowed is None:
        raise RequestError(
            f"dimensions is {asked} but this model's embeddings have {pooling.size} numbers and were not trained to be "
            "cut: leave it out",
            param="dimensions",
        )
    if not 1 <= asked <= pooling.size or (allowed and asked not in allowed):
        rule = f"one of {', '.join(map(str, allowed))}" if allowed else f"from 1 to {pooling.size}"
        raise RequestError(f"dimensions is {asked} but must be {rule}", param="dimensions")
    return asked


def cut(vector: Vector, size: int, *, normalize: bool) -> Vector:
    """The first numbers of an embedding, at length 1 again if it had that."""
    if size == len(vector):
        return vector
    head = vector[:size]
    return head / max(float(np.linalg.norm(head)), 1e-12) if normalize else head


def cosine(one: Vector, other: Vector) -> float:
    """How alike two embeddings are: 1 for the same direction, -1 for opposite ones, 0 if one of them has none."""
    lengths = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(one @ other) / lengths if lengths > 0 else 0.0


def softmax(logits: Vector) -> Vector:
    """Probabilities of labels of which one is right."""
    powers = np.exp(logits - logits.max())
    probabilities: Vector = powers / powers.sum()
    return probabilities


def sigmoid(logits: Vector) -> Vector:
    """Probabilities of labels that are right or not, each by itself."""
    powers = np.exp(-np.abs(logits))
    probabilities: Vector = np.where(logits >= 0, np.float32(1), powers) / (1 + powers)
    return probabilities
