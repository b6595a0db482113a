"""llama.cpp as one of the engines compared, in an environment of its own; MODEL is a GGUF file.

    python3 -m venv ~/peers/llamacpp/venv
    CMAKE_ARGS=-DGGML_NATIVE=ON ~/peers/llamacpp/venv/bin/pip install --no-binary llama-cpp-python llama-cpp-python

compiles it for this machine (a quarter of an hour on two cores). Its Python class runs one sequence at a time, so this
calls the C interface below it: all sequences of a workload are one batch, as in its own server, and decode together.

Tuned: as many threads as there are physical cores; each sequence has a cache of its own (`kv_unified` off), which is
faster than one for all when nothing is shared; a prefix that all prompts have in common is computed once and copied;
prompts go in batches of 2048 tokens, multiplied 512 at a time; attention as llama.cpp chooses (`flash_attn` auto).
Greedy tokens are picked by numpy from all rows of logits at once, since llama.cpp's samplers sort candidates first.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from child import serve

BATCH_TOKENS = 2048
UBATCH_TOKENS = 512
BLOCK = 256
"""llama.cpp rounds the length of a sequence's cache up to this."""


class LlamaCpp:
    """A model, and a context with room for the next job."""

    def __init__(self, model: str, dtype: str) -> None:
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.context: Any = None
        self.room = (0, 0)
        self.prepare([[1]], 16)

    def describe(self) -> dict[str, Any]:
        return {"version": llama_cpp.__version__, "threads": physical_cores()}

    def prepare(self, prompts: list[list[int]], output_tokens: int) -> None:
        length = max(map(len, prompts)) + output_tokens
        room = (len(prompts), -(-length // BLOCK) * BLOCK)
        if room != self.room:
            if self.context is not None:
                llama_cpp.llama_free(self.context)
            self.context = self._make_context(*room)
            self.room = room
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)

    def _make_context(self, num_sequences: int, length: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_sequences * length
        params.n_seq_max = num_sequences
        params.n_batch, params.n_ubatch = BATCH_TOKENS, UBATCH_TOKENS
        params.n_threads = params.n_threads_batch = physical_cores()
        params.kv_unified = False
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp has no room for {num_sequences} sequences of {length} tokens")
        return context

    def generate(self, prompts: list[list[int]], output_tokens: int) -> int:
        return sum(map(len, self.token_ids(prompts, output_tokens)))

    def token_ids(self, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        """Greedy tokens of all prompts, decoded together."""
        current = self._prefill(prompts)
        outputs = [current]
        for step in range(output_tokens - 1):
            entries = [
                (token, len(prompt) + step, sequence, True)
                for sequence, (token, prompt) in enumerate(zip(current, prompts, strict=True))
            ]
            current = self._decode(entries)
            outputs.append(current)
        return [list(tokens) for tokens in zip(*outputs, strict=True)]

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """Compute all prompts. Returns: the first token of each."""
        shared = common_prefix(prompts)
        if shared:
            for start in range(0, shared, BATCH_TOKENS):
                stop = min(start + BATCH_TOKENS, shared)
                self._decode([(prompts[0][place], place, 0, False) for place in range(start, stop)])
            memory = llama_cpp.llama_get_memory(self.context)
            for sequence in range(1, len(prompts)):
                llama_cpp.llama_memory_seq_cp(memory, 0, sequence, 0, -1)
        entries = [
            (prompt[place], place, sequence, place == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for place in range(shared, len(prompt))
        ]
        batches = (entries[start : start + BATCH_TOKENS] for start in range(0, len(entries), BATCH_TOKENS))
        return [token for batch in batches for token in self._decode(batch)]

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """One call of (token, position, sequence, whether its logits are wanted). Returns: the likeliest tokens."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for row, (token, position, sequence, is_wanted) in enumerate(entries):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = is_wanted
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gives {code} for {len(entries)} tokens")
        num_wanted = sum(entry[3] for entry in entries)
        if not num_wanted:
            return []
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (num_wanted, self.vocab_size))
        return [int(token) for token in logits.argmax(axis=1)]


def common_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all of several prompts begin with; one is left to each, since its logits are wanted."""
    if len(prompts) < 2:
        return 0
    columns = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in columns), min(map(len, prompts)) - 1)


def physical_cores() -> int:
    """Cores that this process may use, siblings counted once."""
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return len(siblings)


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    """Say nothing."""


if __name__ == "__main__":
    serve(LlamaCpp)
