from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
from tests.custom.builder import MODELS
from tests.custom.builder import build as build_custom
from tests.pooling.models import roberta_config, save
from transformers import RobertaForMaskedLM

if TYPE_CHECKING:
    from tests.cli.conftest import Result

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
Shardwright: TypeAlias = "Callable[..., Result]"


def test_inspect_says_what_serving_would_do(shardwright: Shardwright, tiny_llama: Path) -> None:
    document = shardwright("inspect", str(tiny_llama), "--json", "--max-model-len", "100").json
    assert document["architecture"] == "LlamaForCausalLM"
    assert document["num_layers"] == 2
    assert document["attention"]["rung"] == "interface"
    assert document["attention"]["backend"] == "native"
    [group] = document["cache_groups"]
    assert (group["kind"], group["layers"]) == ("full", [0, 1])
    assert group["bytes_per_token"] == 2 * 2 * (16 + 16) * 4
    assert group["bytes_per_request"] == 100 * group["bytes_per_token"]
    assert document["tree"]["parameters"] == document["parameters"]
    assert [entry["module"] for entry in document["replaced"]] == [f"model.layers.{i}.self_attn" for i in range(2)]


def test_inspect_counts_layers_that_the_config_names_otherwise(shardwright: Shardwright, tmp_path: Path) -> None:
    path = build_custom(MODELS / "tril_gpt", tmp_path / "model").path
    text = shardwright("inspect", str(path), "--trust-remote-code").stdout
    assert re.search(r"TrilGPT \(tril-gpt\): .* 3 layers, up to 64 tokens", text)


def test_inspect_draws_the_tree(shardwright: Shardwright, tiny_llama: Path) -> None:
    text = shardwright("inspect", str(tiny_llama), "--params").stdout
    assert "0-1 (2 alike): LlamaDecoderLayer" in text
    assert "paged attention, full" in text
    assert "attention: interface by native kernels: " in text


def test_inspect_shows_which_entry_covers_what(shardwright: Shardwright, tiny_llama: Path, tmp_path: Path) -> None:
    text = shardwright("inspect", str(tiny_llama)).stdout
    assert re.search(r"q_proj: Linear.*<- colwise$", text, flags=re.MULTILINE)
    assert "parallel plan: tensor from the config, pipeline from the config" in text
    file = tmp_path / "plan.json"
    file.write_text('{"lm_head": "colwise_rep"}')
    result = shardwright("inspect", str(tiny_llama), "--tp-plan", str(file))
    assert re.search(r"q_proj: Linear.*<- in no entry of the plan$", result.stdout, flags=re.MULTILINE)
    document = shardwright("inspect", str(tiny_llama), "--json", "--tp-plan", str(file)).json
    assert document["plan"] == {"tp": "file", "pp": "config"}
    assert document["tree"]["children"][1]["style"] == "colwise_rep"


def test_inspect_says_what_becomes_of_experts(shardwright: Shardwright) -> None:
    document = shardwright("inspect", "tests.experts.models:masks", "--json").json
    experts = [(entry["module"], entry["by"]) for entry in document["replaced"] if entry["what"] == "experts"]
    assert experts == [(f"layers.{i}.block", "6 experts at once") for i in range(2)]
    assert document["kept"] == []
    document = shardwright("inspect", "tests.experts.models:capacity", "--json").json
    assert [entry["module"] for entry in document["kept"]] == [f"layers.{i}.block" for i in range(2)]
    text = shardwright("inspect", "tests.experts.models:capacity").stdout
    assert "experts: layers.0.block, layers.1.block as written: all at once, it would not give the same for" in text


def test_inspect_counts_latents_once(shardwright: Shardwright, tmp_path: Path) -> None:
    from transformers import MiniCPM3Config

    config = MiniCPM3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
        architectures=["MiniCPM3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    document = shardwright("inspect", str(tmp_path), "--json", "--max-model-len", "100").json
    [group] = document["cache_groups"]
    assert (group["kind"], group["layers"], group["latent_layers"]) == ("full", [0, 1], [0, 1])
    assert group["bytes_per_token"] == 2 * (16 + 8) * 4
    assert group["bytes_per_request"] == 100 * group["bytes_per_token"]
    assert {entry["by"] for entry in document["replaced"]} == {"paged attention on latents, full"}
    assert "2 cache one latent of 24 numbers a token for all heads" in document["attention"]["reason"]
    text = shardwright("inspect", str(tmp_path)).stdout
    assert "cache: full, 2 layers of latents: 192 B a token" in text


def test_inspect_says_why_a_model_gets_a_lower_rung(shardwright: Shardwright, tmp_path: Path) -> None:
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, architectures=["BloomForCausalLM"])
    config.save_pretrained(tmp_path)
    result = shardwright("inspect", str(tmp_path), "--json")
    assert result.code == 0
    assert result.json["attention"]["rung"] in {"sdpa", "dataflow", "per-request", "recompute"}
    assert "in its own code" in result.json["attention"]["reason"]


def test_inspect_counts_states_by_request(shardwright: Shardwright, tmp_path: Path) -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path)
    document = shardwright("inspect", str(tmp_path), "--json").json
    assert document["attention"]["rung"] == "state"
    [group] = document["cache_groups"]
    assert (group["kind"], group["layers"], group["bytes_per_token"]) == ("state", [0, 1], 0)
    assert group["bytes_per_request"] > 0


@pytest.mark.parametrize("depth", ["-1", "x"])
def test_depth_is_a_whole_number(shardwright: Shardwright, depth: str) -> None:
    assert shardwright("inspect", "m", "--depth", depth).code == 2


def test_inspect_shows_an_encoder_as_it_would_be_served(shardwright: Shardwright, tmp_path: Path) -> None:
    save(RobertaForMaskedLM, roberta_config(), tmp_path)
    document = shardwright("inspect", str(tmp_path), "--json").json
    assert (document["task"], document["architecture"], document["max_model_len"]) == ("embed", "RobertaModel", 62)
    assert document["attention"] == {"rung": "none", "reason": "texts are read whole, without a cache"}
    assert [group["kind"] for group in document["cache_groups"]] == ["none"]
    assert "attention: none: texts are read whole" in shardwright("inspect", str(tmp_path)).stdout


def test_inspect_lists_what_is_quantized(shardwright: Shardwright, tiny_llama: Path) -> None:
    document = shardwright("inspect", str(tiny_llama), "--quantization", "int8", "--json").json
    linears = [entry["module"] for entry in document["replaced"] if entry["what"] == "linear"]
    assert document["quantization"]["format"] == "int8 in groups of 32"
    assert document["quantization"]["linears"] == len(linears) >= 14
    assert "model.layers.1.mlp.down_proj" in linears
    assert document["quantization"]["weight_bytes"] < document["weight_bytes"] / 2
    text = shardwright("inspect", str(tiny_llama), "--quantization", "int4").stdout
    assert re.search(r"o_proj: Linear.*<- rowwise; int4 in groups of 32 \(2\)$", text, flags=re.MULTILINE)
    assert f"quantized: {len(linears)} linears, int4 in groups of 32; " in text


def test_inspect_lists_what_is_computed_together(shardwright: Shardwright, tiny_llama: Path) -> None:
    steps = shardwright("inspect", str(tiny_llama), "--json").json["steps"]
    assert steps["recorded"]
    layers = [[f"model.layers.{i}.{part}" for part in parts] for i in range(2) for parts in (QKV, GATED)]
    assert steps["products"] == layers
    assert {"what": "residual + norm", "operations": 7, "count": 4} in steps["runs"]
    assert steps["layer"]["passes"] < steps["layer"]["operations"]
    text = shardwright("inspect", str(tiny_llama)).stdout
    assert "one product: self_attn.q_proj, k_proj, v_proj (2); mlp.gate_proj, up_proj (2)" in text
    assert "residual + norm (4)" in text


def test_inspect_says_why_steps_are_not_recorded(shardwright: Shardwright) -> None:
    document = shardwright("inspect", "tests.experts.models:capacity", "--json").json
    assert document["steps"]["recorded"] is False
    assert document["steps"]["reason"]
    assert "steps: run the model's own code: " in shardwright("inspect", "tests.experts.models:capacity").stdout


def test_inspect_lists_what_takes_one_launch_on_a_gpu(shardwright: Shardwright, tiny_llama: Path) -> None:
    result = shardwright("inspect", str(tiny_llama), "--attention-backend", "triton", "--json").json
    norms = [entry["module"] for entry in result["replaced"] if entry["what"] == "norm"]
    assert len(norms) == 5
    assert "model.norm" in norms
    assert [e["module"] for e in result["replaced"] if e["what"] == "gated"] == [
        f"model.layers.{i}.mlp" for i in (0, 1)
    ]
    assert "native kernels" in result["steps"]["reason"]
