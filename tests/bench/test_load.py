from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from shardwright.bench.bound import Weights, step_seconds
from shardwright.bench.load import Load, load_seconds, loads
from shardwright.bench.machine import Machine
from shardwright.errors import UsageError

MACHINE = Machine(cpu="", cores=2, threads=2, read_gb_per_s=10.0, gemm_gflop_per_s=100.0, gemm_dtype="float32")
WEIGHTS = Weights(num_parameters=50_000_000, num_bytes=100_000_000)


def make_load(*, rate: float = 4.0, num_requests: int = 10, seed: int = 0, first_prompt: int = 0) -> Load:
    return Load(
        rate=rate,
        num_requests=num_requests,
        prompt_tokens=32,
        output_tokens=8,
        seed=seed,
        first_prompt=first_prompt,
    )


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    moments = make_load(num_requests=20_000).arrivals_s()
    gaps = [after - before for before, after in pairwise(moments)]
    assert moments[0] == 0.0
    assert min(gaps) >= 0.0
    assert statistics.mean(gaps) == pytest.approx(1 / 4, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.03)  # as large as the mean: exponential
    assert sum(gap > 1 / 4 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.01)


def test_arrivals_are_those_of_their_seed() -> None:
    assert make_load(seed=1).arrivals_s() == make_load(seed=1).arrivals_s()
    assert make_load(seed=1).arrivals_s() != make_load(seed=2).arrivals_s()
    slow, fast = make_load(rate=1.0).arrivals_s(), make_load(rate=2.0).arrivals_s()
    assert slow == pytest.approx([2 * moment for moment in fast])


def test_loads_that_follow_each_other_share_no_prompt() -> None:
    one, two = loads([1.0, 2.0], num_requests=5, prompt_tokens=32, output_tokens=1, seed=0)
    prompts = [tuple(prompt) for prompt in one.prompts(None) + two.prompts(None)]
    assert len({prompt[:1] for prompt in prompts}) == 10
    assert {len(prompt) for prompt in prompts} == {32}
    assert max(map(max, one.prompts(100))) < 100


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="requests per second"):
        make_load(rate=rate)


def test_a_slow_load_is_bound_by_its_arrivals_and_a_fast_one_by_the_machine() -> None:
    alone_s = step_seconds(32, WEIGHTS, MACHINE) + 7 * step_seconds(1, WEIGHTS, MACHINE)
    slow = make_load(rate=0.01)
    assert load_seconds(slow, WEIGHTS, MACHINE) == pytest.approx(slow.arrivals_s()[-1] + alone_s)
    together_s = step_seconds(320, WEIGHTS, MACHINE) + 7 * step_seconds(10, WEIGHTS, MACHINE)
    assert load_seconds(make_load(rate=1e6), WEIGHTS, MACHINE) == pytest.approx(together_s)
