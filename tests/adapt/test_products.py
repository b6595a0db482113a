"""Products of activations are recognised in every spelling, and give what the call gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.adapt.products import as_product

A, B = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 3, 7)
Q, K = torch.randn(2, 5, 4, 3), torch.randn(2, 7, 4, 3)


def no_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = {
    "matmul": (torch.matmul, (A, B), {}),
    "method": (torch.Tensor.matmul, (A, B), {}),
    "operator": (torch.Tensor.__matmul__, (A, B), {}),
    "keywords": (torch.matmul, (), {"input": A, "other": B}),
    "shared by heads": (torch.matmul, (A, B[:, :1]), {}),
    "shared by groups": (torch.matmul, (A.view(2, 2, 2, 5, 3), B.view(2, 2, 2, 3, 7)[:, :, :1]), {}),
    "bmm": (torch.bmm, (A[0], B[0]), {}),
    "baddbmm": (torch.baddbmm, (torch.zeros(5, 7), A[0], B[0]), {"beta": 0}),
    "einsum": (torch.einsum, ("bqhd,bkhd->bhqk", Q, K), {}),
    "einsum with spaces": (torch.einsum, ("b q h d, b k h d -> b h q k", Q, K), {}),
    "einsum of a list": (torch.einsum, ("bqhd,bkhd->bhqk", [Q, K]), {}),
    "einsum with keys first": (torch.einsum, ("bkhd,bqhd->bhqk", K, Q), {}),
    "einsum with heads last": (torch.einsum, ("bqhd,bkhd->bqkh", Q, K), {}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_products_are_recognised(call: tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]) -> None:
    func, args, kwargs = call
    product = as_product(func, args, kwargs, no_weight)
    assert product is not None
    assert (product.left.shape[1], product.right.shape[2]) == (5, 7), "rows come first in what the call returns"
    torch.testing.assert_close(product.restore(product.left @ product.right), func(*args, **kwargs))


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.matmul, (A[0, 0], B[0, 0])),
        (torch.matmul, (A, nn.Parameter(B))),
        (torch.einsum, ("bqhd,bkhd->bhqk", Q, nn.Parameter(K))),
        (torch.einsum, ("...qhd,...khd->...hqk", Q, K)),
        (torch.einsum, ("bqhd,bkhd->bq", Q, K)),
        (torch.einsum, ("i,j->ij", torch.randn(3), torch.randn(4))),
        (torch.einsum, ("bqhd->bhqd", Q)),
        (torch.add, (A, A)),
    ],
)
def test_others_are_not(func: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    assert as_product(func, args, {}, no_weight) is None
