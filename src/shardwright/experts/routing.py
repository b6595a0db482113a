"""How much of which expert goes to which token: found among the tensors that a block makes before its experts run.

Nothing is read from the code. What the experts added to one tensor is compared with what each guess would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.errors import UnsupportedModelError
from shardwright.experts.body import GroupedBody, run_chosen
from shardwright.experts.region import Region, tokens_first
from shardwright.experts.watch import BlockMode, Key

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Root mean square of differences, against that of what is compared: rounding alone."""


class Weighting(Enum):
    """Where the weights of the chosen experts are."""

    CHOSEN = "one for each choice"
    ALL = "one for each expert, of which those of the chosen ones count"
    NONE = "each chosen expert counts once"


@dataclass(frozen=True, slots=True)
class Routing:
    """Which tensors of a pass decide."""

    rows: Key
    """[T, in]: what experts are given."""
    chosen: Key
    """[T, k] integers: experts of each token."""
    weights: Key | None
    """[T, k], or [T, E]."""
    weighting: Weighting


def find_routing(
    mode: BlockMode, region: Region, body: GroupedBody, *, num_experts: int, expected: Tensor
) -> tuple[float, Routing]:
    """The routing that comes closest to what experts added.

    Args:
        mode, region: of a pass.
        body: of the experts.
        num_experts: of them.
        expected: [T, out], what they added.

    Returns: with the difference from it, relative to its size.
    Raises: UnsupportedModelError if no tensors can be it.
    """
    made = dict(_made_before(mode, region, len(expected)))
    rows = {key: t for key, t in made.items() if t.is_floating_point() and t.shape[1] == body.in_features}
    choices = {key: t for key, t in made.items() if _is_choice(t, num_experts)}
    best: tuple[float, Routing] | None = None
    for row_key, row in _distinct(rows):
        for choice_key, chosen in _distinct(choices):
            given, places = run_chosen(body, row, chosen, num_experts)
            for weight_key, weighting in _weightings(made, chosen.shape[1], num_experts):
                weights = None if weight_key is None else pick(chosen, made[weight_key], weighting)
                difference = relative_difference(mix(given, places, weights), expected)
                if best is None or difference < best[0]:
                    best = difference, Routing(row_key, choice_key, weight_key, weighting)
    if best is None:
        raise UnsupportedModelError("no tensor was found that says which experts a token goes to")
    return best


def pick(chosen: Tensor, weights: Tensor, weighting: Weighting) -> Tensor:
    """The weights of the chosen experts, [T, k].

    Args:
        chosen: [T, k] integers.
        weights: [T, k] or [T, E].
        weighting: which of these it is.
    """
    return weights.gather(1, chosen.long()) if weighting is Weighting.ALL else weights


def mix(given: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """Add up what the chosen experts give.

    Args:
        given: [R, out].
        places: [T, k] int64, the row of each choice.
        weights: [T, k]; None: all are 1.

    Returns: [T, out].
    """
    if weights is None or weights.dtype is given.dtype:
        return F.embedding_bag(places, given, mode="sum", per_sample_weights=weights)
    return (given[places] * weights[..., None]).sum(1)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the differences, against that of the expected numbers."""
    wide = expected.float()
    return float((found.float() - wide).square().mean().sqrt() / wide.square().mean().sqrt().clamp_min(1e-30))


def _made_before(mode: BlockMode, region: Region, num_tokens: int) -> Iterator[tuple[Key, Tensor]]:
    """Tensors with a row for each token, as matrices, that were there before an expert ran."""
    for key in region.made_before(region.first):
        tensor = mode.tensor(key)
        if tensor.numel() and tokens_first(tensor, num_tokens):
            yield key, tensor.reshape(num_tokens, -1)


def _is_choice(tensor: Tensor, num_experts: int) -> bool:
    if tensor.dtype not in (torch.int64, torch.int32) or tensor.shape[1] > num_experts:
        return False
    return bool((tensor >= 0).all() and (tensor < num_experts).all())


def _weightings(made: dict[Key, Tensor], num_chosen: int, num_experts: int) -> Iterator[tuple[Key | None, Weighting]]:
    yield None, Weighting.NONE
    floats = {key: tensor for key, tensor in made.items() if tensor.is_floating_point()}
    for count, weighting in ((num_chosen, Weighting.CHOSEN), (num_experts, Weighting.ALL)):
        for key, _ in _distinct({key: tensor for key, tensor in floats.items() if tensor.shape[1] == count}):
            yield key, weighting


def _distinct(tensors: dict[Key, Tensor]) -> Iterator[tuple[Key, Tensor]]:
    """Those that are not the same numbers as an earlier one."""
    kept: list[Tensor] = []
    for key, tensor in tensors.items():
        if not any(other.dtype is tensor.dtype and torch.equal(other, tensor) for other in kept):
            kept.append(tensor)
            yield key, tensor
