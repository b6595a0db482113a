"""A module comes out of its own code with parameters on "meta" and real tables, or an error says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.models.custom_models import write_code
from transformers import GPT2Config, LlamaConfig, ViTConfig, WhisperConfig

from shardwright.config import DType
from shardwright.errors import ModelSourceError, UnsupportedModelError
from shardwright.models.build import build_module, load_config, max_positions, parameters_on_meta, resolve_dtype


def test_own_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"modeling code \(modeling_tale\.py\).*--trust-remote-code"):
        load_config(write_code(tmp_path / "tale"), trust_remote_code=False)


def test_own_code_runs_when_trusted(tmp_path: Path) -> None:
    config = load_config(write_code(tmp_path / "tale"), trust_remote_code=True)
    module = build_module(config, torch.float32, trust_remote_code=True)
    assert type(module).__name__ == "Tale"
    assert "chapters.chapter_2.listener.to_questions.weight" in dict(module.named_parameters())


def test_config_may_not_smuggle_in_code(tiny_llama: Path, tmp_path: Path) -> None:
    """An auto_map beside a model type that Transformers knows: its own code is used, the directory's is not run."""
    fields = json.loads((tiny_llama / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    config = load_config(tmp_path, trust_remote_code=False)
    assert type(build_module(config, torch.float32, trust_remote_code=False)).__name__ == "LlamaForCausalLM"


def test_parameters_are_on_meta_and_tables_are_real(tmp_path: Path) -> None:
    config = load_config(write_code(tmp_path / "tale"), trust_remote_code=True)
    module = build_module(config, torch.bfloat16, trust_remote_code=True)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert {b.device.type for b in module.buffers()} == {"cpu"}
    assert not module.training
    assert module.get_buffer("chapters.chapter_0.listener.past").sum() == 256 * 257 // 2


def test_a_large_model_takes_no_memory() -> None:
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64)
    module = build_module(config, torch.bfloat16, trust_remote_code=False)
    assert sum(p.numel() for p in module.parameters()) > 3e9
    assert {p.device.type for p in module.parameters()} == {"meta"}


def test_building_leaves_torch_as_it_was() -> None:
    build_module(LlamaConfig(hidden_size=64, num_hidden_layers=1), torch.bfloat16, trust_remote_code=False)
    assert torch.get_default_dtype() is torch.float32
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.empty(1).device.type == "cpu"


def test_attributes_of_parameters_survive_the_move_to_meta() -> None:
    class Owner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
            parameter.no_decay = True  # type: ignore[attr-defined]
            self.gain = parameter

    with parameters_on_meta():
        owner = Owner()
    assert owner.gain.is_meta
    assert owner.gain.no_decay
    assert not owner.gain.requires_grad


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read .*config\.json"),
        ("{", r"cannot read .*config\.json"),
        ("[]", r"config\.json holds no JSON object"),
        ('{"model_type": "hal9000"}', "model_type 'hal9000'.*does not know"),
        ("{}", "model_type None.*does not know"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "config of .* cannot be loaded"),
    ],
)
def test_bad_configs_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelSourceError, match=message):
        load_config(tmp_path, trust_remote_code=False)


def test_missing_code_file_is_named(tmp_path: Path) -> None:
    (write_code(tmp_path / "codeless") / "modeling_tale.py").unlink()
    with pytest.raises(ModelSourceError, match=r"modeling_tale\.py"):
        load_config(tmp_path / "codeless", trust_remote_code=True)


def test_model_that_generates_no_text_is_refused(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    config = load_config(tmp_path, trust_remote_code=False)
    with pytest.raises(ModelSourceError, match="'vit' has no causal language model"):
        build_module(config, torch.float32, trust_remote_code=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constructor_that_fails_is_quoted(tmp_path: Path, dtype: torch.dtype) -> None:
    config = load_config(write_code(tmp_path / "voiceless", num_voices=0), trust_remote_code=True)
    with pytest.raises(UnsupportedModelError, match=r"'tale' failed while it built the model: ZeroDivisionError"):
        build_module(config, dtype, trust_remote_code=True)


@pytest.mark.parametrize(
    ("asked", "in_config", "expected"),
    [
        ("auto", None, torch.float32),  # what the checkpoint holds
        ("auto", "bfloat16", torch.bfloat16),
        ("float16", "bfloat16", torch.float16),
    ],
)
def test_dtype_is_resolved(tiny_llama: Path, asked: DType, in_config: str | None, expected: torch.dtype) -> None:
    assert resolve_dtype(asked, LlamaConfig(dtype=in_config), tiny_llama) is expected


def test_dtype_without_a_checkpoint_is_float32(tmp_path: Path) -> None:
    assert resolve_dtype("auto", LlamaConfig(), tmp_path) is torch.float32


def test_longest_sequence_is_found() -> None:
    assert max_positions(LlamaConfig(max_position_embeddings=77)) == 77
    assert max_positions(GPT2Config(n_positions=33)) == 33
    assert max_positions(WhisperConfig(max_target_positions=44)) == 44
