"""Loading holds the weights once: measured in a process of its own, with a checkpoint that dwarfs the noise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from shardwright.models.build import build_module

MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from tests.loading.checkpoints import load
from shardwright.models.build import build_module, load_config

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

path, dtype = Path(sys.argv[1]), torch.bfloat16
load(Path(sys.argv[2]), dtype)  # imports and first uses are not what is measured
before = status("VmRSS")
model = load(path, dtype)
with torch.inference_mode():
    for parameter in model.parameters():
        parameter.view(torch.uint8).max()  # brings in every page that is still on disk only
print(json.dumps({"growth": status("VmHWM") - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_weights_once(tiny_llama: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    module = build_module(config, torch.bfloat16, trust_remote_code=False)
    weights = {name: torch.randn(p.shape, dtype=torch.bfloat16) for name, p in module.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del weights
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(tiny_llama)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0.9 * size <= json.loads(run.stdout)["growth"] <= 1.35 * size
