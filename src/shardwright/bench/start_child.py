"""`python -m shardwright.bench.start_child MODEL OPTIONS`: start an engine and generate one token, in a fresh process.

OPTIONS is a JSON object of engine options. The last line of stdout is one JSON document with the moments as
time.time(), so that the parent can count from before the interpreter was there. Started by `start.measure_start`.
"""

from __future__ import annotations

import json
import sys
import time

from shardwright.bench.memory import peak_rss_mib
from shardwright.garbage import start_of_process


def main() -> None:
    """Start, generate, report."""
    model, options = sys.argv[1], json.loads(sys.argv[2])
    with start_of_process():
        from shardwright.config import EngineConfig
        from shardwright.engine.start import own_process
        from shardwright.llm import LLM
        from shardwright.sampling_params import SamplingParams

        config = EngineConfig.from_options(model, **options)
        own_process(config)
        engine = LLM.from_config(config)
    with engine as llm:
        ready = time.time()
        llm.generate([{"prompt_token_ids": [1, 2, 3, 4]}], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        first_token = time.time()
    print(json.dumps({"ready": ready, "first_token": first_token, "peak_rss_mib": peak_rss_mib()}))


if __name__ == "__main__":
    main()
