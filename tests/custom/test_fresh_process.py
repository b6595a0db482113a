"""A process that imports nothing but shardwright looks at code as one does that imported everything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.custom.builder import MODELS
from tests.custom.expected import RUNGS

from shardwright.adapt.intercepted_model import LONG_TRACE

SCRIPT = """
import sys
from shardwright import LLM
options = {"load_format": "dummy", "dtype": "float32", "kv_cache_memory_bytes": "4MiB", "max_num_seqs": 2}
with LLM(sys.argv[1], trust_remote_code=True, **options) as llm:
    print(llm.info.attention_rung, llm.info.attention_reason)
"""


def test_far_positions_are_looked_at_before_the_compiler_is_there(tmp_path: Path) -> None:
    path = shutil.copytree(MODELS / "causal_llama", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_seq_len": 2 * LONG_TRACE}))
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=False)
    assert run.stdout.split(maxsplit=1)[:1] == [RUNGS["causal_llama"]], run.stdout + run.stderr[-3000:]
