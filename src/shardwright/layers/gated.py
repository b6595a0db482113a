"""Which modules multiply the activation of one linear by another one, and multiply the product by a third.

They are found by what they do. Their code is run with small linears in the place of its own, the last of which changes
nothing, so that what it makes between them can be compared with each activation, to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn

from shardwright.kernels.gated import Activation, gated

WIDTH_IN, WIDTH = 24, 40
"""Sizes of the small linears: input, and between them."""
TOLERANCE = 2e-5
"""Of the largest difference in float32, against the largest number."""
MOST_ROUNDED_OTHERWISE = 0.01
"""Part of the numbers of a smaller type that may be rounded to the neighbour."""
SCALES = (0.3, 4.0)


@dataclass(frozen=True, slots=True)
class FoundGated:
    """A module that is gated."""

    activation: Activation
    first: str
    """Name of its linear that makes the gate, or gate and values."""
    second: str | None
    """Of that which makes the values, if the first does not."""
    last: str
    is_gate_first: bool = True
    """Of both halves that the first makes."""


@torch.no_grad()
def as_gated(module: nn.Module) -> FoundGated | None:
    """What gated module it is; None if it is none."""
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    own = {id(parameter) for linear in linears.values() for parameter in linear.parameters()}
    if len(linears) not in (2, 3) or any(id(parameter) not in own for parameter in module.parameters()):
        return None
    for candidate in _candidates(linears):
        try:
            if (activation := _activation(module, linears, candidate)) is not None:
                first, second, last, is_gate_first = candidate
                return FoundGated(activation, first, second, last, is_gate_first)
        except Exception:  # its code may want other arguments, other sizes, or other linears in these places
            continue
    return None


def _candidates(linears: dict[str, nn.Linear]) -> Iterator[tuple[str, str | None, str, bool]]:
    """Who may make the gate, the values and the result, by their sizes; and which half is the gate."""
    for first, *others in permutations(linears):
        last = others[-1]
        if len(linears) == 2 and linears[first].out_features == 2 * linears[last].in_features:
            yield first, None, last, True
            yield first, None, last, False
        elif len(linears) == 3:
            gate, values = linears[first], linears[others[0]]
            shapes = {(one.weight.shape, one.weight.dtype, one.bias is None) for one in (gate, values)}
            if len(shapes) == 1 and gate.out_features == linears[last].in_features:
                yield first, others[0], last, True


def _activation(
    module: nn.Module, linears: dict[str, nn.Linear], candidate: tuple[str, str | None, str, bool]
) -> Activation | None:
    first, second, last, is_gate_first = candidate
    made, device = linears[first], linears[first].weight.device
    generator = torch.Generator().manual_seed(0)

    def small(num_outputs: int) -> nn.Linear:
        linear = nn.Linear(WIDTH_IN, num_outputs, bias=made.bias is not None)
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        return linear

    stand_ins = {first: small(WIDTH if second else 2 * WIDTH), last: nn.Linear(WIDTH, WIDTH, bias=False)}
    stand_ins[last].weight.copy_(torch.eye(WIDTH))
    if second:
        stand_ins[second] = small(WIDTH)
    # Copied are those alone, not the weights that they stand for.
    copied = copy.deepcopy(module, {id(linears[name]): stand_in for name, stand_in in stand_ins.items()}).eval()
    remaining = set(Activation)
    for dtype in {torch.float32, made.weight.dtype}:
        copied.to(device, dtype)
        for scale in SCALES:
            rows = (scale * torch.randn(2, 9, WIDTH_IN, generator=generator)).to(device, dtype)
            given = rows.clone()
            actual = copied(given)
            if actual.dtype is not dtype or not torch.equal(rows, given):
                return None
            both = torch.cat([stand_ins[name](rows) for name in (first, second) if name], -1)
            remaining = {one for one in remaining if _is_same(actual, gated(both, one, is_gate_first=is_gate_first))}
    return min(remaining, default=None)


def _is_same(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    if actual.dtype is torch.float32:
        return bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().max())
    return float((actual != expected).float().mean()) <= MOST_ROUNDED_OTHERWISE
