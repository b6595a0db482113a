"""What is understood of attention that code computes itself, and when it is better left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.custom.models.baddbmm_net.modeling_baddbmm_net import BaddbmmConfig, BaddbmmNet
from tests.custom.models.capped_scores.modeling_capped_scores import CappedConfig, CappedLM
from tests.custom.models.flat_head.modeling_flat_head import FlatHeadConfig, FlatHeadGPT
from tests.custom.models.float_mask_sinusoid.modeling_float_mask_sinusoid import SinusoidConfig, SinusoidLM
from tests.custom.models.grouped_einsum.modeling_grouped_einsum import GroupedEinsumConfig, GroupedEinsumLM
from tests.custom.models.grouped_queries.modeling_grouped_queries import GroupedConfig, GroupedLM
from tests.custom.models.last_logits.modeling_last_logits import LastLogitsConfig, LastLogitsGPT
from tests.custom.models.local_global.modeling_local_global import LocalGlobalConfig, LocalGlobalLM
from tests.custom.models.own_softmax.modeling_own_softmax import OwnSoftmaxConfig, OwnSoftmaxLM
from tests.custom.models.sink_column.modeling_sink_column import SinkColumnConfig, SinkColumnLM
from tests.custom.models.stretched_rope.modeling_stretched_rope import StretchedConfig, StretchedLM
from tests.custom.models.tiled_heads.modeling_tiled_heads import TiledHeadsConfig, TiledHeadsLM
from tests.custom.models.tril_gpt.modeling_tril_gpt import TrilConfig, TrilGPT

from shardwright.adapt.intercepted_model import LONG_TRACE, InterceptedModel
from shardwright.cache.spec import Visibility, VisibilityKind
from shardwright.errors import UnsupportedModelError


def understood(kind: Any, config: Any, num_positions: int = 256, *, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
    model.to(dtype).requires_grad_(False)
    return InterceptedModel(model, num_positions=num_positions, vocab_size=config.vocab_size)


def test_heads_and_scale_of_a_call() -> None:
    served = understood(GroupedLM, GroupedConfig())
    assert {(layer.num_heads, layer.num_kv_heads) for layer in served.layers} == {(4, 1)}
    assert {fitted.params.scale for fitted in served._attentions} == {0.3}


@pytest.mark.parametrize(("kind", "config"), [(GroupedEinsumLM, GroupedEinsumConfig), (TiledHeadsLM, TiledHeadsConfig)])
def test_repeated_heads_are_kept_once_in_any_order(kind: Any, config: Any) -> None:
    served = understood(kind, config())
    assert {(layer.num_heads, layer.num_kv_heads) for layer in served.layers} == {(4, 2)}
    orders = [None if a.order is None else a.order.tolist() for a in served._attentions]
    assert orders == ([[0, 2, 1, 3]] * 2 if kind is TiledHeadsLM else [None] * 2)


def test_sinks_are_read_from_weights() -> None:
    served = understood(SinkColumnLM, SinkColumnConfig())
    for fitted, layer in zip(served._attentions, served.module.layers, strict=True):
        torch.testing.assert_close(fitted.params.sinks_H, layer.sinks.data, rtol=1e-3, atol=1e-3)
    for fitted in understood(OwnSoftmaxLM, OwnSoftmaxConfig())._attentions:
        assert fitted.params.sinks_H.tolist() == [0.0] * 4


@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_caps_and_scales_are_read_from_scores(cap: float) -> None:
    served = understood(CappedLM, CappedConfig(soft_cap=cap))
    for fitted in served._attentions:
        assert fitted.params.softcap == cap
        assert fitted.params.scale == pytest.approx(1.5, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_scores_are_understood(dtype: torch.dtype) -> None:
    served = understood(TrilGPT, TrilConfig(block_size=256), dtype=dtype)
    for fitted in served._attentions:
        assert fitted.params.softcap is None
        assert fitted.params.scale == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("window", [1, 8, LONG_TRACE + 91])
def test_windows_are_seen_however_long(window: int) -> None:
    config = LocalGlobalConfig(window=window, max_position_embeddings=1024)
    layers = understood(LocalGlobalLM, config, num_positions=1024).layers
    sliding = Visibility(VisibilityKind.SLIDING, window)
    assert [layer.visibility for layer in layers] == [sliding, Visibility(), sliding]


def test_a_table_that_grows_is_made_anew() -> None:
    served = understood(BaddbmmNet, BaddbmmConfig(), num_positions=1024)
    assert served._forgets
    assert not understood(TrilGPT, TrilConfig(block_size=256))._forgets


def test_a_table_that_is_too_short_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match="a table in its code has 600 positions, but 1,024 are to be served"
    ):
        understood(SinusoidLM, SinusoidConfig(max_position_embeddings=600), num_positions=1024)


def test_frequencies_that_stretch_far_away_are_refused() -> None:
    config = StretchedConfig(trained_length=LONG_TRACE + 20, max_position_embeddings=1024)
    with pytest.raises(UnsupportedModelError, match="in a pass of 1,024 tokens its code does something else"):
        understood(StretchedLM, config, num_positions=1024)
    assert understood(StretchedLM, config, num_positions=LONG_TRACE).layers


def test_what_long_prompts_give_is_kept_to_compare_with() -> None:
    sample = understood(TrilGPT, TrilConfig(block_size=256)).sample
    assert len(sample.tokens) == 256
    assert sample.places[-1] == 255
    assert sample.logits.shape == (len(sample.places), 128)
    sample = understood(LastLogitsGPT, LastLogitsConfig(block_size=64), num_positions=64).sample
    assert (sample.places, sample.logits.shape) == ([63], (1, 128))


def test_a_prompt_that_code_does_not_take_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"forward pass of 256 tokens fails: AssertionError: Cannot forward"
    ):
        understood(TrilGPT, TrilConfig(block_size=64))


def test_a_head_that_needs_all_rows_gets_them() -> None:
    assert understood(FlatHeadGPT, FlatHeadConfig()).head is None
    assert understood(TrilGPT, TrilConfig(block_size=256)).head is not None
