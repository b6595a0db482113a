"""What keys and values are made of is seen in the code's dataflow, whatever it is called and however it is spelled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.adapt.models import make_model
from tests.custom.models.latent_parts.modeling_latent_parts import PartsConfig, PartsLM
from tests.custom.models.latent_sdpa.modeling_latent_sdpa import LatentConfig, LatentLM
from torch import Tensor, nn

from shardwright.adapt.intercepted_model import InterceptedModel
from shardwright.adapt.latent import Latent, LatentFinder, LatentTaps, might_have_latents
from shardwright.adapt.probe import NUM_PROBE_TOKENS
from shardwright.adapt.served_model import ServedModel
from shardwright.cache.spec import LayerSpec
from shardwright.errors import UnsupportedModelError
from shardwright.models.build import build_module

MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip


def own_code(kind: Any = LatentLM, config: Any = None) -> InterceptedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config or LatentConfig()).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
    return InterceptedModel(model.requires_grad_(False), num_positions=64, vocab_size=128)


def sizes(layer: LayerSpec) -> tuple[int, ...]:
    return layer.num_heads, layer.num_kv_heads, layer.key_dim, layer.value_dim


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "minicpm3", "longcat_flash"])
def test_transformers_models_cache_their_latents(model_type: str) -> None:
    served = ServedModel(make_model(model_type, **MLA), num_positions=256)
    assert {sizes(layer) for layer in served.layers} == {(4, 1, 24, 16)}
    assert all(layer.values_in_keys and layer.elements_per_token == 24 for layer in served.layers)
    assert f"; {len(served.layers)} cache one latent of 24 numbers a token for all heads" in served.rung_reason


def test_a_model_on_meta_shows_the_same() -> None:
    model = make_model("minicpm3", **MLA)
    on_meta = build_module(model.config, torch.bfloat16, trust_remote_code=False)
    assert ServedModel(on_meta, num_positions=256).layers == ServedModel(model, num_positions=256).layers


def test_weights_are_views_of_the_model_s() -> None:
    model = make_model("deepseek_v3", **MLA)
    [latent, _] = ServedModel(model, num_positions=256).latents.by_call
    assert latent is not None
    up = model.model.layers[0].self_attn.kv_b_proj.weight
    for part, rows in (
        (latent.projection.up_key_KNR, up.view(4, 28, 16)[:, :16]),
        (latent.projection.up_value_KVR, up.view(4, 28, 16)[:, 16:]),
    ):
        assert part.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        assert torch.equal(part, rows)
    assert latent.projection.shared == slice(16, 24)


def test_own_code_caches_its_latents() -> None:
    served = own_code()
    assert [sizes(layer) for layer in served.layers] == [(4, 1, 24, 16)] * 2
    assert served.rung_reason.endswith("; 2 cache one latent of 24 numbers a token for all heads")


def test_parameters_in_products_are_found_and_shared_parts_may_come_first() -> None:
    served = own_code(PartsLM, PartsConfig())
    assert [sizes(layer) for layer in served.layers] == [(4, 1, 32, 16)] * 2
    for latent, block in zip(served.latents.by_call, served.module.blocks, strict=True):
        assert latent is not None
        assert latent.projection.shared == slice(0, 16)
        torch.testing.assert_close(latent.projection.up_key_KNR, block.up_key.permute(1, 2, 0), rtol=0, atol=0)
        torch.testing.assert_close(latent.projection.up_value_KVR, block.up_value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"up_bias": True}, "attention 0: a bias is added to its keys or values"),
        ({"turns_all": True}, "attention 0: no part of its keys is made by a linear map of what its values are made"),
        ({"num_attention_heads": 1, "rope_dim": 2, "kv_rank": 14, "nope_dim": 60, "value_dim": 2}, ""),
        ({"num_attention_heads": 2, "kv_rank": 30, "nope_dim": 24, "value_dim": 2}, "attention 0: its latent would sa"),
    ],
)
def test_what_stands_in_the_way_is_said(config: dict[str, Any], reason: str) -> None:
    served = own_code(config=LatentConfig(**config))
    if not reason:
        assert all(layer.values_in_keys for layer in served.layers)
        return
    assert not any(layer.values_in_keys for layer in served.layers)
    assert f"keys and values are cached as they are: {reason}" in served.rung_reason


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_other_models_are_not_looked_at_twice(model_type: str) -> None:
    model = make_model(model_type)
    layers = ServedModel(model, num_positions=256).layers
    assert not any(layer.values_in_keys for layer in layers)
    if model_type != "gemma2":
        assert not might_have_latents(model, layers)


SPEC = LayerSpec("layer", 4, 4, 6, 4)


class Attention(nn.Module):
    """A latent that goes wrong in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.up = nn.Linear(5, 4 * 8, bias=False)
        self.other = nn.Linear(5, 4 * 8, bias=False)

    def forward(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.up(latent).view(1, -1, 4, 8).transpose(1, 2)
        own, value = heads.split(4, dim=-1)
        shared = shared[:, None].expand(-1, 4, -1, -1)
        if self.how == "other head's":
            shared = shared * torch.arange(4.0).view(4, 1, 1)
        if self.how == "other input":
            own = self.other(latent * 2).view(1, -1, 4, 8).transpose(1, 2)[..., :4]
        if self.how == "between":
            return torch.cat([own[..., :2], shared, own[..., 2:]], dim=-1)[0], value[0]
        if self.how == "shifted":
            value = value.roll(1, dims=2)
        if self.how == "scaled":
            value = value * 2
        return torch.cat([own, shared], dim=-1)[0], value[0]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("right", ""),
        ("other head's", "beside outputs of a linear map is not the same for all heads"),
        ("other input", "no part of its keys is made by a linear map of what its values are made of"),
        ("between", "the numbers of its keys that heads share lie among the others"),
        ("shifted", "not all made by one linear map, each token's of its own input"),
        ("scaled", "its values are no outputs of a linear map"),
    ],
)
@torch.inference_mode()
def test_dataflow_that_is_another_is_refused(how: str, reason: str) -> None:
    module = Attention(how)
    finder = LatentFinder(module, [SPEC])
    with finder.watching():
        finder.look(0, *module(torch.randn(1, 7, 5), torch.randn(1, 7, 2)))
    assert (finder.result.by_call[0] is None) == bool(reason)
    assert reason in finder.result.reason


@torch.inference_mode()
def test_numbers_have_to_agree() -> None:
    """A module that says it is linear, and is not."""

    class Rounded(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).round()

    module = Attention("right")
    module.up.__class__ = Rounded
    finder = LatentFinder(module, [SPEC])
    with finder.watching():
        finder.look(0, *module(torch.randn(1, 7, 5), torch.randn(1, 7, 2)))
    assert "not the linear function of its latent that they seem to be" in finder.result.reason


@torch.inference_mode()
def test_a_latent_that_does_not_come_is_an_error() -> None:
    module = Attention("right")
    finder = LatentFinder(module, [SPEC])
    latent, shared = torch.randn(1, NUM_PROBE_TOKENS, 5), torch.randn(1, NUM_PROBE_TOKENS, 2)
    with finder.watching():
        finder.look(0, *module(latent, shared))
    taps = LatentTaps(module, finder.result.by_call)
    with taps.open():
        module(latent, shared)
        taken = taps.take(0)
        assert taken is not None
        assert torch.equal(taken[0], latent[0])
        with pytest.raises(UnsupportedModelError, match="makes keys and values in another way"):
            taps.take(0)
    assert isinstance(finder.result.by_call[0], Latent)
