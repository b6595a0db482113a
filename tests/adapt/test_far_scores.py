"""Masks and biases are found at far positions in the ways that code makes them, without computing that far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tests.adapt.test_intercepted_model import understood
from tests.custom.models.alibi_bare.modeling_alibi_bare import AlibiConfig, AlibiLM
from tests.custom.models.clipped_relative.modeling_clipped_relative import ClippedRelativeConfig, ClippedRelativeLM
from tests.custom.models.local_global.modeling_local_global import LocalGlobalConfig, LocalGlobalLM
from tests.custom.models.moe_loop.modeling_moe_loop import MoeLoopConfig, MoeLoopLM
from tests.custom.models.t5_bias.modeling_t5_bias import T5BiasConfig, T5BiasLM
from torch import Tensor, nn

from shardwright.cache.spec import Visibility, VisibilityKind
from shardwright.errors import UnsupportedModelError

WINDOW, POSITIONS = 700, 1024


def test_a_window_that_no_config_names_is_found() -> None:
    class Unnamed(LocalGlobalLM):
        def __init__(self, config: LocalGlobalConfig) -> None:
            super().__init__(config)
            del config.window

    layers = understood(Unnamed, LocalGlobalConfig(window=WINDOW, max_position_embeddings=POSITIONS), POSITIONS).layers
    sliding = Visibility(VisibilityKind.SLIDING, WINDOW)
    assert [layer.visibility for layer in layers] == [sliding, Visibility(), sliding]


@dataclass
class Config:
    """Of a model of one layer."""

    mask: Callable[[Tensor], Tensor]
    """Of scores [1, T, T]."""
    vocab_size: int = 50


class Attention(nn.Module):
    """One head that masks its scores in some way."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.mask = nn.Linear(16, 48), mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.mask(q @ k.mT).softmax(-1) @ v


class OneLayer(nn.Module):
    """The model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(config.vocab_size, 16), nn.Linear(16, config.vocab_size)
        self.attention = Attention(config.mask)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.attention(self.embed(tokens)))


def of_ones_like(scores: Tensor) -> Tensor:
    past = torch.ones_like(scores).tril() - torch.ones_like(scores).tril(-WINDOW)
    return scores.masked_fill(past == 0, float("-inf"))


def of_new_tensors(scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    past = scores.new_ones(length, length).tril().triu(1 - WINDOW)
    return scores * past - 1e9 * (1 - past)


def of_type_as(scores: Tensor) -> Tensor:
    length = scores.size(-1)
    mask = torch.full((length, length), -torch.inf, device=scores.device)
    return scores + (mask.triu(1) + mask.tril(-WINDOW)).type_as(scores)


def in_place(scores: Tensor) -> Tensor:
    i = torch.arange(scores.shape[-1], device=scores.device)
    distance = i[:, None] - i
    scores[:, (distance < 0) | (distance >= WINDOW)] = torch.finfo(scores.dtype).min
    return scores


def in_another_shape(scores: Tensor) -> Tensor:
    i = torch.arange(scores.shape[-1], device=scores.device)
    allowed = (i <= i[:, None]) & (i > i[:, None] - WINDOW)
    return torch.where(allowed, scores.view(1, 1, *scores.shape[-2:]).float(), -1e4)[0].to(scores)


@pytest.mark.parametrize("mask", [of_ones_like, of_new_tensors, of_type_as, in_place, in_another_shape])
def test_masks_in_all_spellings(mask: Callable[[Tensor], Tensor]) -> None:
    (layer,) = understood(OneLayer, Config(mask), POSITIONS).layers
    assert layer.visibility == Visibility(VisibilityKind.SLIDING, WINDOW)


def tril_in_place(scores: Tensor) -> Tensor:
    return scores.exp().tril_().log()


def by_rows(scores: Tensor) -> Tensor:
    past = (scores * 0 + 1).cumsum(-2) - (scores * 0 + 1).cumsum(-1)
    return scores.masked_fill((past < 0) | (past >= WINDOW), float("-inf"))


@pytest.mark.parametrize("mask", [by_rows, tril_in_place])
def test_masks_that_are_computed_from_scores_are_refused(mask: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match="attention 0"):
        understood(OneLayer, Config(mask), POSITIONS)


def test_code_that_looks_at_values_runs_on() -> None:
    layers = understood(MoeLoopLM, MoeLoopConfig(max_position_embeddings=POSITIONS), POSITIONS).layers
    assert {layer.visibility for layer in layers} == {Visibility()}


def test_biases_reach_as_far_as_sequences() -> None:
    slopes = understood(AlibiLM, AlibiConfig(), POSITIONS)._attentions
    assert {tuple(fitted.params.bias_HN.shape) for fitted in slopes} == {(4, POSITIONS)}
    assert slopes[0].params.bias_HN is slopes[1].params.bias_HN, "equal ones are kept once"
    for kind, config in ((T5BiasLM, T5BiasConfig()), (ClippedRelativeLM, ClippedRelativeConfig())):
        tables = understood(kind, config, POSITIONS)._attentions
        assert all(fitted.bias.is_settled for fitted in tables)
