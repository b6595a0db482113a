"""Products of activations are recognised in every spelling, and give what the call gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.adapt.products import RowLabels, as_product, heads_of, without_product

A, B = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 3, 7)
Q, K = torch.randn(2, 5, 4, 3), torch.randn(2, 7, 4, 3)
GROUPED_Q, GROUPED_W = torch.randn(2, 5, 4, 6, 3), torch.randn(2, 4, 6, 5, 7)


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
    "einsum with dots": (torch.einsum, ("...qd,...dk->...qk", A, B), {}),
    "einsum of groups": (torch.einsum, ("btkgd,bskd->bkgts", GROUPED_Q, K), {}),
    "einsum of groups with keys first": (torch.einsum, ("bskd,btkgd->bkgts", K, GROUPED_Q), {}),
    "einsum of groups to values": (torch.einsum, ("bkgts,bskd->btkgd", GROUPED_W, torch.randn(2, 7, 4, 7)), {}),
    "einsum with keys that all heads share": (torch.einsum, ("bthd,bsd->bhts", Q, K[:, :, 0]), {}),
    "einsum with heads last": (torch.einsum, ("bqhd,bkhd->bqkh", Q, K), {}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_products_are_recognised(call: tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]) -> None:
    func, args, kwargs = call
    product = as_product(func, args, kwargs, no_weight, RowLabels(5, {}))
    assert product is not None
    assert (product.left.shape[1], product.right.shape[2]) == (5, 7), "rows come first in what the call returns"
    torch.testing.assert_close(product.restore(product.left @ product.right), func(*args, **kwargs))


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.matmul, (A[0, 0], B[0, 0])),
        (torch.matmul, (A, nn.Parameter(B))),
        (torch.einsum, ("bqhd,bkhd->bhqk", Q, nn.Parameter(K))),
        (torch.einsum, ("...qhd,...khdx->...hqk", Q, torch.randn(2, 7, 4, 3, 2))),
        (torch.einsum, ("btkgd,bskd->bkgts", torch.randn(2, 6, 4, 6, 3), K)),
        (torch.einsum, ("bqhd,bkhd->bhqk", Q, K[:, :, :1])),
        (torch.einsum, ("bqhd,bkhd->bq", Q, K)),
        (torch.einsum, ("i,j->ij", torch.randn(3), torch.randn(4))),
        (torch.einsum, ("bqhd->bhqd", Q)),
        (torch.add, (A, A)),
    ],
)
def test_others_are_not(func: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    assert as_product(func, args, {}, no_weight, RowLabels(5, {})) is None


def test_a_label_that_a_trace_showed_is_known_at_any_number_of_tokens() -> None:
    labels: dict[str, str] = {}
    equation = "btkgd,bskd->bkgts"
    assert as_product(torch.einsum, (equation, GROUPED_Q, K), {}, no_weight, RowLabels(5, labels)) is not None
    one = torch.randn(2, 1, 4, 6, 3)  # as one token, and as many as there are groups
    for query in (one, torch.randn(2, 6, 4, 6, 3)):
        product = as_product(torch.einsum, (equation, query, K), {}, no_weight, RowLabels(None, labels))
        assert product is not None
        assert product.left.shape == (48, query.shape[1], 3)


def test_what_is_added_to_a_product_is_known() -> None:
    added, left, right = torch.randn(5, 7), A[0], B[0]
    result = torch.baddbmm(added, left, right, beta=2)
    blank = without_product(torch.baddbmm, (added, left, right), {"beta": 2}, result)
    torch.testing.assert_close(blank, torch.baddbmm(added, torch.zeros_like(left), right, beta=2))
    assert not without_product(torch.matmul, (left, right), {}, left @ right).any()


@pytest.mark.parametrize(
    ("query", "key", "heads"),
    [((4, 5, 3), (4, 5, 3), 4), ((1, 6, 5, 3), (1, 2, 5, 3), 2), ((1, 2, 3, 5, 3), (1, 2, 1, 5, 3), 6)],
)
def test_heads_are_one_dimension(query: tuple[int, ...], key: tuple[int, ...], heads: int) -> None:
    shapes = [tuple(t.shape) for t in heads_of(torch.zeros(query), torch.zeros(key), torch.zeros(key))]
    assert shapes == [(6 if len(query) > 3 else 4, 5, 3), (heads, 5, 3), (heads, 5, 3)]


def test_several_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="several sequences"):
        heads_of(*(torch.zeros(2, 4, 5, 3),) * 3)
