"""The oracle itself, against attention written by hand."""

from __future__ import annotations

import pytest
import torch
from tests.attention.steps import Heads, attention_by_hand, make_step, random_bias

from shardwright.attention.layout import AttentionParams
from shardwright.attention.reference import ReferenceBackend
from shardwright.cache.spec import Visibility, VisibilityKind

SEQUENCES = [(0, 7), (5, 1), (9, 4), (0, 1)]
VISIBILITIES = [Visibility(), Visibility(VisibilityKind.SLIDING, 4), Visibility(VisibilityKind.CHUNKED, 5)]


@pytest.mark.parametrize("visibility", VISIBILITIES, ids=lambda v: v.kind.value)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("num_distances", [0, 3, 40])
def test_reference_equals_attention_by_hand(
    visibility: Visibility, softcap: float | None, has_sinks: bool, num_distances: int
) -> None:
    heads = Heads(num_kv_heads=2, group=3, key_dim=5, value_dim=3)
    step = make_step(SEQUENCES, heads, block_size=4, visibility=visibility)
    params = AttentionParams(
        scale=0.7,
        softcap=softcap,
        sinks_H=torch.linspace(-1, 2, 6) if has_sinks else None,
        bias_HN=random_bias(6, num_distances),
    )
    actual = step.run(ReferenceBackend(block_size=4), visibility, params)
    torch.testing.assert_close(actual.double(), attention_by_hand(step, visibility, params), atol=1e-5, rtol=1e-5)


def test_sinks_take_weight_from_values() -> None:
    heads = Heads(num_kv_heads=1, group=1, key_dim=2, value_dim=2)
    step = make_step([(0, 3)], heads, block_size=4, visibility=Visibility())
    backend = ReferenceBackend(block_size=4)
    params = AttentionParams(scale=1.0, sinks_H=torch.full((1,), 50.0))
    assert step.run(backend, Visibility(), params).abs().max() < 1e-6
