"""`shardwright plan`, as a person and as a program call it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
import yaml
from transformers import LlamaConfig

if TYPE_CHECKING:
    from tests.cli.conftest import Result

Shardwright: TypeAlias = "Callable[..., Result]"

GIB = 1 << 30

CHECK_AND_MEASURE = """
import re, runpy, sys, time
try:
    runpy.run_module("shardwright", run_name="__main__")
finally:  # what the parent is told of a child's peak begins with the parent's own
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
    print(peak[1], time.process_time(), file=sys.stderr)
"""
"""Runs the program, then says KiB and seconds of CPU that it took."""


def test_show_says_how_the_model_is_cut(shardwright: Shardwright, tiny_llama: Path) -> None:
    result = shardwright("plan", "show", str(tiny_llama), "--tp", "2", "--pp", "2")
    assert result.code == 0
    assert "tp 2 (the model's config), pp 2 (the model's config)" in result.stdout
    assert "dim 0: 2 x 32" in result.stdout
    assert "model.embed_tokens, model.layers.0" in result.stdout


def test_show_as_json(shardwright: Shardwright, tiny_llama: Path) -> None:
    document = shardwright("plan", "show", str(tiny_llama), "--tp", "3", "--pp", "1", "--json").json
    assert {"ok", "tp", "pp", "parameters", "memory", "findings"} <= document.keys()
    assert (document["tp"]["size"], document["tp"]["source"], document["pp"]["size"]) == (3, "config", 1)
    query = next(p for p in document["parameters"] if p["name"] == "model.layers.0.self_attn.q_proj.weight")
    assert set(query) == {"name", "shape", "style", "matched_by", "dim", "pieces"}
    assert sum(query["pieces"]) == query["shape"][query["dim"]]
    assert len(document["memory"]) == 3


def test_check_of_a_wrong_plan_is_exit_code_1(shardwright: Shardwright, tiny_llama: Path, tmp_path: Path) -> None:
    plan = shardwright("plan", "show", str(tiny_llama), "--json").json["tp"]["patterns"]
    plan["model.layers.*.mlp.down_prj"] = plan.pop("model.layers.*.mlp.down_proj")
    file, page = tmp_path / "plan.json", tmp_path / "report.html"
    file.write_text(json.dumps(plan))
    result = shardwright("plan", "check", str(tiny_llama), "--tp-plan", str(file), "--html", str(page))
    assert result.code == 1
    assert result.stdout.splitlines()[1] == "error: model.layers.*.mlp.down_prj"
    assert 'fix: "model.layers.*.mlp.down_proj": "rowwise"' in result.stdout
    assert "model.layers.*.mlp.down_prj" in page.read_text()
    document = shardwright("plan", "check", str(tiny_llama), "--tp-plan", str(file), "--json").json
    assert document["findings"][0].keys() == {"severity", "where", "message", "fix"}
    assert document["findings"][0]["severity"] == "error"


def test_infer_writes_a_plan_that_holds(shardwright: Shardwright, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    result = shardwright("plan", "infer", str(tiny_llama), "--write", str(file), "--json")
    assert result.json["tp"]["source"] == "inferred"
    written = yaml.safe_load(file.read_text())
    assert written["tp_plan"] == result.json["tp"]["patterns"]
    assert written["tp_plan"]["model.layers.*.mlp.down_proj"] == "rowwise"
    given = ("--tp-plan", str(file), "--pp-plan", str(file))
    assert shardwright("plan", "check", str(tiny_llama), *given).code == 0


def test_prove(shardwright: Shardwright, tiny_llama: Path, tmp_path: Path) -> None:
    result = shardwright("plan", "prove", str(tiny_llama), "--tp", "2", "--pp", "1", "--json")
    assert result.code == 0
    assert result.json["ok"]
    assert result.json["first_divergence"] is None
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"model.layers.*.mlp.down_proj": "rowwise_split_input", "lm_head": "colwise"}))
    wrong = shardwright("plan", "prove", str(tiny_llama), "--tp", "2", "--pp", "1", "--tp-plan", str(file))
    assert wrong.code == 1
    assert "does not hold" in wrong.stdout


def test_a_split_names_the_stages(shardwright: Shardwright, tiny_llama: Path) -> None:
    document = shardwright("plan", "show", str(tiny_llama), "--tp", "1", "--pp-split", "1,1", "--json").json
    assert document["pp"]["size"] == 2
    wrong = shardwright("plan", "check", str(tiny_llama), "--pp-split", "2,1")
    assert (wrong.code, "fix: --pp-split 1,1" in wrong.stdout) == (1, True)


def test_a_split_is_proved(shardwright: Shardwright, tiny_llama: Path) -> None:
    proof = shardwright("plan", "prove", str(tiny_llama), "--tp", "1", "--pp-split", "1,1", "--json").json
    assert (proof["ok"], proof["pp"]) == (True, 2)
    wrong = shardwright("plan", "prove", str(tiny_llama), "--pp-split", "2,1")
    assert (wrong.code, wrong.stderr.splitlines()[-1]) == (
        2,
        "error: pp split 2,1 does not deal 2 layers to 2 stages of at least one",
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "/no/such/model"], "/no/such/model"),
        (["check", "{model}", "--tp", "0"], "'--tp'"),
        (["check", "{model}", "--tp-plan", "/no/such/plan.json"], "plan file /no/such/plan.json cannot be read"),
        (["check", "{model}", "--pp-split", "1,x"], "pp_split is '1,x'"),
        (["check", "{model}", "--pp", "3", "--pp-split", "1,1"], "pp_split 1,1 names 2 stages"),
        (["infer", "{model}", "--write", "plan.txt"], "a plan is written to a .json or .yaml file"),
        (["check", "{model}", "--html", "/no/such/folder/page.html"], "cannot be written"),
        (["shwo"], "shwo"),
    ],
)
def test_wrong_use_is_exit_code_2(shardwright: Shardwright, tiny_llama: Path, arguments: list[str], says: str) -> None:
    result = shardwright("plan", *(argument.replace("{model}", str(tiny_llama)) for argument in arguments))
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert says in result.stderr


@pytest.mark.slow
def test_check_of_a_70b_config_takes_seconds_and_no_weights(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    command = [
        sys.executable,
        "-c",
        CHECK_AND_MEASURE,
        "plan",
        "check",
        str(tmp_path),
        "--tp",
        "8",
        "--pp",
        "4",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ok"]
    peak_kib, cpu_s = map(float, done.stderr.split()[-2:])
    assert peak_kib * 1024 < GIB
    assert cpu_s < 20, "some 8 s on a machine that is not busy"


def test_show_counts_the_bytes_of_quantized_weights(shardwright: Shardwright, tiny_llama: Path) -> None:
    def memory(*flags: str) -> list[int]:
        document = shardwright("plan", "show", str(tiny_llama), "--tp", "2", "--pp", "1", "--json", *flags).json
        return [rank["weight_bytes"] for rank in document["memory"]]

    plain, quantized = memory(), memory("--quantization", "int4", "--quantization-group-size", "16")
    assert max(quantized) < min(plain) / 2


def test_an_unknown_quantization_is_wrong_usage(shardwright: Shardwright, tiny_llama: Path) -> None:
    result = shardwright("plan", "show", str(tiny_llama), "--quantization", "int3")
    assert result.code == 2
    assert "none" in result.stderr
    assert "int4" in result.stderr
