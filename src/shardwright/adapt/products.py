"""Batched matrix products in all their spellings, in one form: [N, rows, inner] times [N, inner, columns]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
_ADDED = {torch.baddbmm, torch.Tensor.baddbmm}


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two batches of matrices that a function call asks for."""

    left: Tensor
    """[N, rows, inner]."""
    right: Tensor
    """[N, inner, columns]."""
    restore: Callable[[Tensor], Tensor]
    """[N, rows, columns] to the shape and order that the call returns."""


def as_product(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_weight: Callable[[Tensor], bool]
) -> Product | None:
    """The product that a call computes, if it is one of two batches of matrices and no weight takes part.

    Args:
        func, args, kwargs: the call.
        is_weight: whether a tensor is a parameter, or a part of one.
    """
    if func in _MATMULS:
        operands = (*args, *kwargs.values())
    elif func in _ADDED:
        operands = (*args[1:], *(kwargs[name] for name in ("batch1", "batch2") if name in kwargs))
    elif func is torch.einsum and isinstance(args[0], str):
        operands = (*args[1], *args[2:]) if isinstance(args[1], (tuple, list)) else args[1:]
    else:
        return None
    if len(operands) < 2 or any(is_weight(operand) for operand in operands[:2]):
        return None
    left, right = operands[:2]
    if func is torch.einsum:
        return _einsum_product(args[0], left, right) if len(operands) == 2 else None
    if left.ndim < 3 or right.ndim < 3:
        return None
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return Product(
        left.expand(*batch, *left.shape[-2:]).reshape(-1, *left.shape[-2:]),
        right.expand(*batch, *right.shape[-2:]).reshape(-1, *right.shape[-2:]),
        lambda result: result.reshape(*batch, *result.shape[-2:]),
    )


def without_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Tensor:
    """What a call that computes a product would give if that were all zero; `result` is what it gives."""
    if func not in _ADDED:
        return torch.zeros_like(result)
    added = args[0] if args else kwargs["input"]
    beta = kwargs.get("beta", 1)
    return torch.zeros_like(result).add_(added, alpha=beta) if beta else torch.zeros_like(result)


def _einsum_product(equation: str, left: Tensor, right: Tensor) -> Product | None:
    """The product in an einsum such as `bqhd,bkhd->bhqk`; None if it is something else.

    Rows are the dimension that comes first in the result, whichever operand has it.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or "." in equation:
        return None
    first, second = terms
    inner = [c for c in first if c in second and c not in out]
    batch = [c for c in first if c in second and c in out]
    rows, columns = [c for c in first if c not in second], [c for c in second if c not in first]
    if len(inner) != 1 or len(rows) != 1 or len(columns) != 1 or sorted(out) != sorted(batch + rows + columns):
        return None
    if out.index(rows[0]) > out.index(columns[0]):
        return _einsum_product(f"{second},{first}->{out}", right, left)
    sizes = dict(zip(first, left.shape, strict=True)) | dict(zip(second, right.shape, strict=True))
    shape = [sizes[c] for c in batch]

    def arranged(tensor: Tensor, labels: str, last_two: list[str]) -> Tensor:
        order = [labels.index(c) for c in (*batch, *last_two)]
        return tensor.permute(order).reshape(prod(shape), *(sizes[c] for c in last_two))

    def restore(result: Tensor) -> Tensor:
        labels = [*batch, *rows, *columns]
        return result.reshape(*shape, *result.shape[-2:]).permute([labels.index(c) for c in out])

    return Product(arranged(left, first, rows + inner), arranged(right, second, inner + columns), restore)
