"""Batched matrix products in all their spellings, in one form: [N, rows, inner] times [N, inner, columns]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
ADDED = {torch.baddbmm, torch.Tensor.baddbmm}
"""Functions that add a product to their first argument."""


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
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_weight: Callable[[Tensor], bool],
    row_labels: RowLabels,
) -> Product | None:
    """The product that a call computes, if it is one of two batches of matrices and no weight takes part.

    Args:
        func, args, kwargs: the call.
        is_weight: whether a tensor is a parameter, or a part of one.
        row_labels: for einsums.
    """
    if func in _MATMULS:
        operands = (*args, *kwargs.values())
    elif func in ADDED:
        operands = (*args[1:], *(kwargs[name] for name in ("batch1", "batch2") if name in kwargs))
    elif func is torch.einsum and isinstance(args[0], str):
        operands = (*args[1], *args[2:]) if isinstance(args[1], (tuple, list)) else args[1:]
    else:
        return None
    if len(operands) < 2 or any(is_weight(operand) for operand in operands[:2]):
        return None
    left, right = operands[:2]
    if func is torch.einsum:
        return _einsum_product(args[0], left, right, row_labels) if len(operands) == 2 else None
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
    if func not in ADDED:
        return torch.zeros_like(result)
    added = args[0] if args else kwargs["input"]
    beta = kwargs.get("beta", 1)
    return torch.zeros_like(result).add_(added, alpha=beta) if beta else torch.zeros_like(result)


def heads_of(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of scaled_dot_product_attention, [..., T, D], with one dimension of heads: [H, T, D] or [K, T, D].

    Raises: ValueError if they are of several sequences, or not of one form.
    """
    if not 3 <= query.ndim == key.ndim == value.ndim or (query.ndim > 3 and len(query) > 1):
        raise ValueError("they are of several sequences, or not of one form")

    def heads(tensor: Tensor) -> Tensor:
        given, wanted = tensor.shape[:-2], query.shape[:-2]
        shape = [w if g == 1 else g for g, w in zip(given, wanted, strict=True)]
        flat: Tensor = tensor.expand(*shape, *tensor.shape[-2:]).flatten(0, -3)
        return flat

    return heads(query), heads(key), heads(value)


class RowLabels:
    """Which label of an einsum such as `btkgd,bskd->bkgts` counts tokens, where it could be more than one.

    Args:
        num_tokens: of a pass that shows it, or None.
        known: by equation; what is found is added.
    """

    def __init__(self, num_tokens: int | None, known: dict[str, str]) -> None:
        self._num_tokens = num_tokens
        self.known = known

    def choose(self, equation: str, sizes: dict[str, int]) -> str | None:
        """The label among these; None if it is not known."""
        if len(sizes) == 1:
            return next(iter(sizes))
        if equation not in self.known:
            found = [label for label, size in sizes.items() if size == self._num_tokens]
            if len(found) != 1:
                return None
            self.known[equation] = found[0]
        return self.known[equation]


def _einsum_product(equation: str, left: Tensor, right: Tensor, row_labels: RowLabels) -> Product | None:
    """The product in an einsum such as `bqhd,bkhd->bhqk`; None if it is something else.

    Only one operand has labels, other than rows or columns, that the other lacks: groups of query heads. It is the left
    one; without any, rows are the dimension that comes first in the result, whichever operand has it.
    """
    spelled = _spelled_out(equation, left, right)
    if spelled is None:
        return None
    first, second, out = spelled
    inner = [c for c in first if c in second and c not in out]
    batch = [c for c in first if c in second and c in out]
    own, columns = [c for c in first if c not in second], [c for c in second if c not in first]
    is_swapped = len(columns) > 1 or (len(own) == len(columns) == 1 and out.find(own[0]) > out.find(columns[0]))
    if is_swapped:
        first, second, left, right, own, columns = second, first, right, left, columns, own
    if len(inner) != 1 or not own or len(columns) != 1 or sorted(out) != sorted(batch + own + columns):
        return None
    sizes = dict(zip(first, left.shape, strict=True))
    if any(sizes.setdefault(c, size) != size for c, size in zip(second, right.shape, strict=True)):
        return None
    rows = row_labels.choose(equation, {c: sizes[c] for c in own})
    if rows is None:
        return None
    groups = [c for c in own if c != rows]
    shape = [sizes[c] for c in (*batch, *groups)]

    def arranged(tensor: Tensor, labels: str, last_two: list[str]) -> Tensor:
        present = [c for c in (*batch, *groups) if c in labels]
        tensor = tensor.permute([labels.index(c) for c in (*present, *last_two)])
        tensor = tensor[(..., *[None] * (len(shape) - len(present)), slice(None), slice(None))]
        return tensor.expand(*shape, -1, -1).reshape(prod(shape), *tensor.shape[-2:])

    def restore(result: Tensor) -> Tensor:
        labels = [*batch, *groups, rows, *columns]
        return result.reshape(*shape, *result.shape[-2:]).permute([labels.index(c) for c in out])

    return Product(arranged(left, first, [rows, *inner]), arranged(right, second, [*inner, *columns]), restore)


def _spelled_out(equation: str, left: Tensor, right: Tensor) -> tuple[str, str, str] | None:
    """Labels of both operands and of the result, `...` replaced by letters; None if it is no product of two."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    spare = [c for c in ascii_letters if c not in equation]
    spelled, most = [], ""
    for term, tensor in zip(terms, (left, right), strict=True):
        num_hidden = tensor.ndim - len(term.replace("...", ""))
        hidden = "".join(spare[:num_hidden][::-1])  # the last ones are those that both have
        most = max(most, hidden, key=len)
        spelled.append(term.replace("...", hidden))
    return spelled[0], spelled[1], out.replace("...", most)
