"""Run workloads on an `LLM` in this process and measure throughput and latency."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardwright.bench.bound import Weights, workload_seconds
from shardwright.bench.workloads import Workload
from shardwright.sampling_params import SamplingParams

if TYPE_CHECKING:
    from shardwright.bench.machine import Machine
    from shardwright.llm import LLM

PERCENTILES = (50, 90, 99)
WARM_UP_TOKENS = 4


@dataclass(kw_only=True, slots=True)
class Measurement:
    """One run of a workload, in seconds."""

    elapsed_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    """Per request: from the start of the workload to its first token."""
    itl_s: list[float] = field(default_factory=list)
    """Between one token of a request and its next."""


def measure(llm: LLM, workload: Workload) -> Measurement:
    """Run a workload once, with a cold prefix cache."""
    llm.reset_prefix_cache()
    prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
    params = SamplingParams(temperature=0, max_tokens=workload.output_tokens, ignore_eos=True)
    measurement = Measurement()
    previous: dict[int, float] = {}
    start = time.perf_counter()
    for index, delta in llm.stream(prompts, params):
        now = time.perf_counter()
        if not any(completion.token_ids for completion in delta.outputs):
            continue
        if index in previous:
            measurement.itl_s.append(now - previous[index])
        else:
            measurement.ttft_s.append(now - start)
        previous[index] = now
    measurement.elapsed_s = time.perf_counter() - start
    return measurement


def measure_best(llm: LLM, workload: Workload, *, repeat: int) -> Measurement:
    """The fastest of several runs."""
    return min((measure(llm, workload) for _ in range(repeat)), key=lambda run: run.elapsed_s)


def warm_up(llm: LLM) -> None:
    """Run a little of prefill and decode, so that no workload pays for what is set up on first use."""
    params = SamplingParams(temperature=0, max_tokens=WARM_UP_TOKENS, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [1, 2, 3, 4]}] * 2, params, use_tqdm=False)


def obstacle(workload: Workload, llm: LLM) -> str | None:
    """Why the model cannot run a workload, or None if it can."""
    if workload.longest > llm.info.max_model_len:
        return f"needs {workload.longest} tokens a request, but max_model_len is {llm.info.max_model_len}"
    return None


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90 and p99 by nearest rank; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{p}": round(ordered[max(0, -(-p * len(ordered) // 100) - 1)], 5) for p in PERCENTILES}


def workload_as_json(workload: Workload, run: Measurement, *, weights: Weights, machine: Machine) -> dict[str, Any]:
    """One row of `bench --json`: what was measured, and the bound beside it."""
    bound_s = workload_seconds(workload, weights, machine)
    total_tokens = workload.num_prompt_tokens + workload.num_output_tokens
    return {
        "name": workload.name,
        "requests": len(workload.prompts),
        "prompt_tokens": workload.num_prompt_tokens,
        "output_tokens": workload.num_output_tokens,
        "elapsed_s": round(run.elapsed_s, 4),
        "output_tokens_per_s": round(workload.num_output_tokens / run.elapsed_s, 2),
        "total_tokens_per_s": round(total_tokens / run.elapsed_s, 2),
        "headline": workload.headline,
        "bound_tokens_per_s": round(workload.num_headline_tokens / bound_s, 2),
        "fraction_of_bound": round(bound_s / run.elapsed_s, 4),
        "ttft_s": percentiles(run.ttft_s),
        "itl_s": percentiles(run.itl_s),
    }
