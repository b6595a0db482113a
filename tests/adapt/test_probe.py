"""One short forward pass shows what every layer asks of its attention, or why it cannot be ours."""

from __future__ import annotations

import pytest
import torch
from tests.adapt.models import make_model
from tests.models.custom_models import make_tale
from tests.models.modeling_tale import Tale

from shardwright.adapt import dispatch
from shardwright.adapt.probe import AttentionCall, probe_attention
from shardwright.adapt.served_model import ServedModel
from shardwright.cache.spec import Visibility, VisibilityKind
from shardwright.errors import UnsupportedModelError
from shardwright.models.build import build_module

FULL = Visibility()
WINDOW = Visibility(VisibilityKind.SLIDING, 16)


def calls_of(model_type: str, **config: object) -> list[AttentionCall]:
    dispatch.register()
    return probe_attention(make_model(model_type, **config), num_positions=256)


def test_heads_sizes_and_names_are_read() -> None:
    calls = calls_of("llama")
    assert [call.spec.name for call in calls] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    spec = calls[0].spec
    assert (spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim) == (4, 2, 16, 16)
    assert spec.visibility == FULL
    assert calls[0].params.scale == pytest.approx(16**-0.5)
    assert calls[0].params.softcap is None
    assert calls[0].params.sinks_H is None


def test_multi_query_attention_is_read() -> None:
    spec = calls_of("gpt_bigcode", n_embd=64, n_head=4, n_layer=1)[0].spec
    assert (spec.num_heads, spec.num_kv_heads) == (4, 1)


def test_latent_attention_has_keys_and_values_of_different_size() -> None:
    spec = calls_of(
        "deepseek_v3", num_key_value_heads=4, head_dim=8, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=32, first_k_dense_replace=1,
    )[0].spec  # fmt: skip
    assert (spec.key_dim, spec.value_dim) == (24, 12)


def test_windows_softcaps_and_scales_are_read_per_layer() -> None:
    calls = calls_of("gemma2", sliding_window=16, query_pre_attn_scalar=64, attn_logit_softcapping=30.0)
    assert [call.spec.visibility for call in calls] == [WINDOW, FULL]
    assert {call.params.softcap for call in calls} == {30.0}
    assert {call.params.scale for call in calls} == {64**-0.5}


def test_chunks_are_read() -> None:
    calls = calls_of(
        "llama4_text", attention_chunk_size=16, no_rope_layers=[1, 0], intermediate_size_mlp=96, num_local_experts=2
    )
    assert [call.spec.visibility for call in calls] == [Visibility(VisibilityKind.CHUNKED, 16), FULL]


def test_sinks_are_the_layer_s_own() -> None:
    calls = calls_of("gpt_oss", sliding_window=16, num_local_experts=2, num_experts_per_tok=1, intermediate_size=32)
    for call in calls:
        assert call.params.sinks_H is call.module.sinks
    assert [call.spec.visibility for call in calls] == [WINDOW, FULL]


def test_window_as_long_as_the_model_is_full() -> None:
    assert {call.spec.visibility for call in calls_of("mistral", sliding_window=256)} == {FULL}


def test_a_model_on_meta_shows_the_same() -> None:
    dispatch.register()
    model = make_model("gemma2", sliding_window=16)
    on_meta = build_module(model.config, torch.bfloat16, trust_remote_code=False)
    calls = probe_attention(on_meta, num_positions=256)
    expected = probe_attention(model, num_positions=256)
    assert [call.spec for call in calls] == [call.spec for call in expected]
    assert [call.params for call in calls] == [call.params for call in expected]


def test_a_mask_that_no_layer_uses_stands_in_nobody_s_way() -> None:
    """Qwen2-MoE makes a sliding mask of width 0 where no layer slides; Bart one for an encoder that is not there."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    assert {call.spec.visibility for call in calls_of("qwen2_moe", use_sliding_window=False, **moe)} == {FULL}
    assert calls_of("bart", d_model=64, decoder_layers=1, decoder_attention_heads=4)[0].spec.visibility == FULL


def test_own_code_that_dispatches_is_read() -> None:
    calls = probe_attention(make_tale(), num_positions=256)
    assert [call.spec.name for call in calls] == [f"chapters.chapter_{i}.listener" for i in range(3)]
    assert (calls[0].spec.num_heads, calls[0].spec.num_kv_heads) == (4, 2)


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("bloom", {"n_head": 4}, "never calls Transformers' attention interface"),
        ("gptj", {"n_embd": 64, "n_head": 4, "n_layer": 1, "rotary_dim": 8}, "never calls Transformers'"),
        ("doge", {}, "attention mask that its code builds itself"),
        ("bert", {"is_decoder": False}, r"bert\.encoder\.layer\.0\.attention\.self.* not causal"),
    ],
)
def test_what_stands_in_the_way_is_said(model_type: str, config: dict[str, object], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        calls_of(model_type, **config)


class TakesNoPositions(Tale):
    def forward(self, input_ids=None, use_cache=None):  # type: ignore[no-untyped-def]
        return super().forward(input_ids)


def test_code_that_takes_no_positions_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"TakesNoPositions\.forward takes no position_ids"):
        ServedModel(make_tale(TakesNoPositions), num_positions=256)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"position_bias": torch.zeros(1)}, "adds a position_bias"),
        ({"alibi": torch.zeros(1)}, "adds a alibi"),
        ({"is_causal": False}, "asks for attention that is not causal"),
        ({"attention_mask": torch.zeros(1, 1, 13, 13)}, "attention mask that its code builds itself"),
    ],
)
def test_calls_that_ask_for_more_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], reason: str
) -> None:
    model = make_tale()
    listener = model.chapters["chapter_1"].listener

    def forward(x, position_ids):  # type: ignore[no-untyped-def]
        heads = torch.zeros(1, 4, x.shape[1], 16)
        attend = dispatch.AttentionInterface()[dispatch.PROBE]
        return attend(listener, heads, heads, heads, **({"attention_mask": None} | options))[0].flatten(-2)

    monkeypatch.setattr(listener, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=rf"chapters\.chapter_1\.listener .*{reason}"):
        ServedModel(model, num_positions=256)


def test_code_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tale()

    def forward(x):  # type: ignore[no-untyped-def]
        raise RuntimeError("no more words")

    monkeypatch.setattr(model.end, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="short forward pass failed: RuntimeError: no more words"):
        ServedModel(model, num_positions=256)
