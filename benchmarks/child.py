"""An engine in a process of its own, that runs what `peers.py` asks for.

    python peer_hf.py MODEL DTYPE [what the engine takes beside that]

Standard library only, since peers have environments of their own.

On stdout comes one JSON line when the first token is there, then one for each job read from stdin: a JSON line with
`prompts` (token ids) and `output_tokens` (of each). Moments are time.time(), since the parent counts from before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

FIRST_PROMPT = [1, 2, 3, 4]


class Engine(Protocol):
    """What is compared."""

    def describe(self) -> dict[str, Any]:
        """Versions and settings, for the report."""
        ...

    def prepare(self, prompts: list[list[int]], output_tokens: int) -> None:
        """Forget cached prefixes, and make room for a job; not timed."""
        ...

    def generate(self, prompts: list[list[int]], output_tokens: int) -> int:
        """Generate greedily, past end-of-sequence. Returns: tokens generated, over all prompts."""
        ...


def serve(load: Callable[..., Engine]) -> None:
    """Load an engine and run jobs on it until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr

    def reply(document: dict[str, Any]) -> None:
        replies.write(json.dumps(document) + "\n")
        replies.flush()

    engine = load(*sys.argv[1:])
    ready = time.time()
    engine.generate([FIRST_PROMPT], 1)
    reply({"ready": ready, "first_token": time.time(), **engine.describe()})
    for line in sys.stdin:
        job = json.loads(line)
        engine.prepare(job["prompts"], job["output_tokens"])
        start = time.perf_counter()
        num_tokens = engine.generate(job["prompts"], job["output_tokens"])
        elapsed_s = time.perf_counter() - start
        if num_tokens != len(job["prompts"]) * job["output_tokens"]:
            raise RuntimeError(f"{num_tokens} tokens instead of {len(job['prompts'])} times {job['output_tokens']}")
        reply({"elapsed_s": elapsed_s})
