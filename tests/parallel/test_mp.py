from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.parallel.served import PROMPTS, SharedRanks, add, generate, make_config

from shardwright.engine.core import EngineCore
from shardwright.errors import ConfigError, PlanError, RanksLostError, UsageError
from shardwright.parallel.executor import ParallelExecutor
from shardwright.parallel.mp import MpRanks
from shardwright.worker.batch import Batch


def children() -> list[psutil.Process]:
    """Processes of ranks that this one has."""
    return [p for p in psutil.Process().children() if "shardwright.parallel.rank" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[list[int]]:
    """Tokens by one rank."""
    return generate(EngineCore.from_config(make_config(tiny_llama)))


@pytest.fixture(scope="module")
def pair() -> Iterator[SharedRanks]:
    """Two ranks that share every layer."""
    shared = SharedRanks(MpRanks)
    yield shared
    shared.close()


def test_two_ranks_give_the_tokens_of_one(tiny_llama: Path, pair: SharedRanks, expected: list[list[int]]) -> None:
    core = pair.serve(make_config(tiny_llama, tp=2))
    assert generate(core) == expected
    assert generate(core, PROMPTS[::-1]) == expected[::-1]  # on blocks and rows that others had before
    whole = core.info.num_parameters * 4
    assert core.info.weight_bytes == sum(core.info.rank_weight_bytes)
    assert max(core.info.rank_weight_bytes) < 0.52 * whole


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_guessing_ahead_changes_no_token_of_two_ranks(
    tiny_llama: Path, pair: SharedRanks, expected: list[list[int]], method: str
) -> None:
    core = pair.serve(make_config(tiny_llama, tp=2, **guessing(tiny_llama, method)))
    assert generate(core) == expected
    assert core.stats.num_proposed_tokens > 0
    if method == "draft":  # the model itself, whole on one rank
        assert core.stats.num_accepted_tokens > 0.8 * core.stats.num_proposed_tokens


@pytest.mark.slow
def test_guessing_ahead_changes_no_token_of_two_stages(tiny_llama: Path, expected: list[list[int]]) -> None:
    stages = SharedRanks(MpRanks)
    for method in ("ngram", "draft"):
        core = stages.serve(make_config(tiny_llama, pp=2, **guessing(tiny_llama, method)))
        assert generate(core) == expected
        assert core.stats.num_proposed_tokens > 0
    stages.close()


def guessing(path: Path, method: str) -> dict[str, object]:
    """Options under which a whole batch guesses ahead."""
    chosen = {"speculative_method": "ngram"} if method == "ngram" else {"speculative_model": str(path)}
    return chosen | {"speculative_step_tokens": 32, "prompt_lookup_min": 1}


def test_a_killed_rank_is_noticed_at_once(tiny_llama: Path, pair: SharedRanks) -> None:
    config = make_config(tiny_llama, tp=2)
    core = pair.serve(config)
    ranks = pair.ranks_for(config)
    assert isinstance(ranks, MpRanks)
    add(core, PROMPTS)
    core.step()
    core.executor.submit(core.scheduler.schedule())
    os.kill(ranks.process_ids[1], signal.SIGKILL)
    started = time.monotonic()

    def go_on() -> None:  # the step in flight may be done
        while True:
            core.executor.collect()
            core.executor.submit(Batch(rows=[0], num_computed=[0], num_tokens=[1], new_rows=[], table_updates=[]))

    with pytest.raises(RanksLostError, match="rank 1 was killed by SIGKILL"):
        go_on()
    assert time.monotonic() - started < 2
    assert ranks.is_lost
    assert not any(psutil.pid_exists(number) for number in ranks.process_ids)


@pytest.mark.slow
def test_requests_go_on_after_a_rank_was_killed(tiny_llama: Path, pair: SharedRanks, expected: list[list[int]]) -> None:
    config = make_config(tiny_llama, tp=2)
    core = pair.serve(config)
    ranks = pair.ranks_for(config)
    assert isinstance(ranks, MpRanks)
    add(core, PROMPTS)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(PROMPTS))}
    for step in range(200):
        if step == 5:
            os.kill(ranks.process_ids[step % 2], signal.SIGKILL)
        for output in core.step().outputs:
            tokens[output.request_id] += output.new_token_ids
    assert list(tokens.values()) == expected
    assert core.stats.num_restarts == 1
    assert pair.ranks_for(config) is not ranks


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed(tiny_llama: Path) -> None:
    config = make_config(tiny_llama, backend="mp")
    ranks = MpRanks(config, step_timeout_s=0.5)
    executor = ParallelExecutor(config, lambda: ranks)
    core = EngineCore(config, executor)
    add(core, PROMPTS)
    os.kill(ranks.process_ids[0], signal.SIGSTOP)
    executor.submit(core.scheduler.schedule())
    with pytest.raises(RanksLostError, match="no rank has finished the step in 0.5 s"):
        executor.collect()
    assert not any(psutil.pid_exists(number) for number in ranks.process_ids)
    with pytest.raises(RanksLostError, match="no rank has finished"):
        executor.collect()
    core.close()
    core.close()


PROGRAM = """
import sys
from shardwright import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, dtype="float32", kv_cache_memory_bytes="16MiB")
print("ready", flush=True)
params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
for _ in range(1000):
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
"""
"""Without a guard for its main module: ranks do not import it."""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_the_program_whatever_ends_it(tiny_llama: Path, tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    program = subprocess.Popen(
        [sys.executable, str(script), str(tiny_llama)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"ready\n"
    ranks = psutil.Process(program.pid).children()
    assert len(ranks) == 2
    time.sleep(0.2)  # in the middle of steps
    if number is signal.SIGINT:  # as Ctrl-C does: everybody in the terminal gets it
        os.killpg(program.pid, number)
    else:
        program.send_signal(number)
    program.communicate(timeout=20)
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive


@pytest.mark.slow
def test_a_registered_model_reaches_the_ranks(tmp_path: Path) -> None:
    """Its factory stands in the program's main module."""
    script = tmp_path / "program.py"
    script.write_text(REGISTERING)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = done.stdout.splitlines()
    assert one == two


REGISTERING = """
import torch
from torch import nn
from torch.nn import functional

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(x)))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

if __name__ == "__main__":
    from shardwright import LLM, SamplingParams, register_model
    register_model("mine", Model, vocab_size=64, max_model_len=64)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for tp in (1, 2):
        with LLM("mine", tensor_parallel_size=tp, kv_cache_memory_bytes="1MiB") as llm:
            print(llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)[0].outputs[0].token_ids)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tp": 5}, PlanError, "cannot be dealt to 5 ranks"),
        ({"pp": 3}, PlanError, "2 layers cannot be dealt to 3 pipeline stages"),
        ({"tp": 2, "tp_plan": "/nowhere/plan.yaml"}, PlanError, "/nowhere/plan.yaml"),
        ({"tp": 2, "kv_cache_memory_bytes": 1000, "max_model_len": 256}, ConfigError, "raise --kv-cache-memory-bytes"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_process(
    tiny_llama: Path, options: dict[str, object], error: type[UsageError], message: str
) -> None:
    before = children()
    with pytest.raises(error, match=message) as raised:
        EngineCore.from_config(make_config(tiny_llama, **options))
    assert "\n" not in str(raised.value)
    assert children() == before
