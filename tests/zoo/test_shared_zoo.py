"""A larger zoo, where there is one: models of some hundred architectures with reference tokens, built by their own
script. Set SHARDWRIGHT_ZOO to the folder that holds its zoo.py and entries.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from shardwright import LLM, SamplingParams

ZOO = Path(os.environ.get("SHARDWRIGHT_ZOO") or Path(__file__).parents[3] / "shared" / "zoo")
ENTRIES = json.loads((ZOO / "entries.json").read_text()) if (ZOO / "zoo.py").exists() else {}
STATES = ("jamba", "kimi_linear", "mamba2", "minimax", "qwen3_next", "recurrent_gemma", "rwkv")
SAMPLE = {*list(ENTRIES)[::4], *STATES}
"""What every run of the tests has of them; `make sweep` runs the rest."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ENTRIES, reason=f"there is no zoo in {ZOO}: set SHARDWRIGHT_ZOO to its folder"),
]


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> Path:
    """Directory of the built zoo; what is missing is built first, once per version of script and Transformers."""
    sources = (ZOO / "zoo.py").read_bytes() + (ZOO / "entries.json").read_bytes() + transformers.__version__.encode()
    directory = request.config.cache.mkdir("zoo") / hashlib.sha256(sources).hexdigest()[:12]
    wanted = {
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "module", None) is request.module
    }  # type: ignore[attr-defined]
    missing = sorted(name for name in wanted if not (directory / name / "reference.json").exists())
    if missing:
        command = [sys.executable, str(ZOO / "zoo.py"), "build", str(directory), "--only", ",".join(missing)]
        subprocess.run(command, check=False, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    return directory


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.sweep) for name in ENTRIES]
)
@pytest.mark.filterwarnings("default")
def test_tokens_equal_the_reference(models: Path, name: str) -> None:
    path = models / name / "reference.json"
    if not path.exists():
        pytest.skip("the zoo could not build it")
    reference = json.loads(path.read_text())
    if not reference["hf_cache_consistent"]:
        pytest.skip("Hugging Face's cached generation differs from its own forward pass")
    prompts = [row["prompt_token_ids"] for row in reference["prompts"]]
    expected = [row["output_token_ids"] for row in reference["prompts"]]
    params = SamplingParams(temperature=0, min_tokens=16, max_tokens=16)
    for options in ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 4}):
        with LLM(str(models / name), dtype="float32", **options) as llm:  # type: ignore[arg-type]
            if ENTRIES[name]["family"] in ("dense", "sliding"):
                assert llm.info.attention_rung == "interface", llm.info.attention_reason
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected
            for prompt, tokens in zip(prompts, expected, strict=True):
                alone = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
                assert alone[0].outputs[0].token_ids == tokens
