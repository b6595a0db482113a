"""Where the time of a step goes: the engine's stages, and within the forward pass each kind of kernel.

    python benchmarks/profile_step.py MODEL                                       # decodes of one request
    python benchmarks/profile_step.py MODEL --requests 32
    python benchmarks/profile_step.py MODEL --prompt-tokens 1024 --output-tokens 1    # prompts

Stages are timed around the calls of the engine's own methods, each without what it calls in turn, so that they add up
to the whole. Of recorded steps, the last one of the size that came most often is repeated instruction by instruction;
kernels are then called one by one, which costs a few microseconds each, so their sum is a little over the forward's.
Where the model's own code runs, PyTorch's profiler shows its operators.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from report import table

from shardwright.bench.workloads import Workload, uniform
from shardwright.engine.core import EngineCore
from shardwright.engine.frontend import Frontend
from shardwright.engine.scheduler import Scheduler
from shardwright.llm import LLM
from shardwright.replay.instructions import MOST_VALUES, Operation
from shardwright.replay.program import Program
from shardwright.sampling_params import SamplingParams
from shardwright.worker import packed
from shardwright.worker.model_runner import ModelRunner
from shardwright.worker.sampler import Sampler

STAGES: list[tuple[Any, str, str]] = [
    (Scheduler, "schedule", "schedule"),
    (EngineCore, "step", "engine, executor"),
    (ModelRunner, "execute", "runner's tables"),
    (packed, "build_inputs", "batch building"),
    (packed.PackedModel, "compute", "model's own code"),
    (Program, "run", "recorded forward"),
    (Sampler, "__call__", "sampling"),
    (Scheduler, "update", "scheduler's update"),
    (Frontend, "process", "output handling"),
]
"""Owner, method, and what is left of it without the others (of `compute`, little where steps are recorded)."""
OUTSIDE = "the caller's loop"
WARM_UPS = 1
REPEATS = 7


class Stopwatch:
    """Exclusive times of nested calls, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._inner = [0.0]

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time noted under the label."""

        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[label] += elapsed - self._inner.pop()
                self.calls[label] += 1
                self._inner[-1] += elapsed

        return wrapper

    def clear(self) -> None:
        """Begin anew."""
        self.seconds.clear()
        self.calls.clear()
        self._inner[:] = [0.0]


class Steps:
    """The recorded steps that ran: how often each size came, and the inputs of its last one."""

    def __init__(self) -> None:
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.last: dict[tuple[int, int], tuple[Program, Any]] = {}

    def noting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`Program.run`, with what it is given kept."""

        @functools.wraps(run)
        def wrapper(program: Program, inputs: Any) -> Any:
            size = (len(inputs.input_ids), len(inputs.logits_rows))
            self.sizes[size] += 1
            self.last[size] = (program, inputs)
            return run(program, inputs)

        return wrapper


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile one kind of step and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--enforce-eager", action="store_true", help="the model's own code, nothing recorded")
    args = parser.parse_args(arguments)
    watch, steps = Stopwatch(), Steps()
    workload = uniform("profile", args.requests, args.prompt_tokens, args.output_tokens)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(Program, "run", steps.noting(Program.run)))
        for owner, name, label in STAGES:
            stack.enter_context(patch.object(owner, name, watch.timed(label, getattr(owner, name))))
        options = {"dtype": args.dtype, "enforce_eager": args.enforce_eager, "trust_remote_code": True}
        llm = stack.enter_context(LLM(args.model, **options))
        job = workload.for_vocabulary(llm.info.vocab_size)
        for _ in range(WARM_UPS):
            generate(llm, job)
        watch.clear()
        steps.sizes.clear()
        start = time.perf_counter()
        generate(llm, job)
        elapsed_s = time.perf_counter() - start
        print("\n".join(stage_table(watch, elapsed_s)), end="\n\n")
        if steps.sizes:
            print("\n".join(kernel_table(steps)))
        else:
            print(operator_table(llm, job))


def generate(llm: LLM, workload: Workload) -> None:
    """Run a workload with a cold prefix cache."""
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=workload.output_tokens, ignore_eos=True)
    llm.generate([{"prompt_token_ids": prompt} for prompt in workload.prompts], params, use_tqdm=False)


def stage_table(watch: Stopwatch, elapsed_s: float) -> list[str]:
    """Milliseconds of each stage in a step, on average, prompts included."""
    num_steps = max(1, watch.calls["engine, executor"])
    seconds = {label: watch.seconds[label] for _, _, label in STAGES}
    seconds[OUTSIDE] = elapsed_s - sum(seconds.values())
    rows = [
        [label, f"{took / num_steps * 1e3:.3f}", f"{took / elapsed_s:.1%}"]
        for label, took in seconds.items()
        if label == OUTSIDE or watch.calls[label]
    ]
    rows.append([f"all, mean of {num_steps} steps", f"{elapsed_s / num_steps * 1e3:.3f}", "100 %"])
    return table(["stage", "ms a step", "share"], rows)


def kernel_table(steps: Steps) -> list[str]:
    """Milliseconds of each kind of instruction in the step whose size came most often."""
    (num_tokens, num_rows), _ = steps.sizes.most_common(1)[0]
    program, inputs = steps.last[num_tokens, num_rows]
    with torch.inference_mode():
        whole_s = min(timed(lambda: program.run(inputs)) for _ in range(REPEATS))
        instructions = program._list(num_tokens, num_rows)
        best: dict[tuple[int, int], float] = {}
        for _ in range(REPEATS):  # of the whole step, so that weights come from memory as they do in one
            for first, end in pieces(instructions):
                took = timed(functools.partial(call, program, instructions, first, end))
                best[first, end] = min(took, best.get((first, end), took))
    seconds: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for (first, end), took in best.items():
        label = Operation(int(instructions[first, 0])).name.lower()
        label += f", {end - first} as one" if end - first > 1 else ""
        seconds[label] += took
        counts[label] += 1
    rows = [
        [label, str(counts[label]), f"{took * 1e3:.3f}", f"{took / counts[label] * 1e6:.1f}"]
        for label, took in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    rows.append(["sum", str(counts.total()), f"{sum(seconds.values()) * 1e3:.3f}", ""])
    rows.append([f"one call, {num_tokens} tokens", "1", f"{whole_s * 1e3:.3f}", ""])
    return table(["kernel", "calls", "ms", "µs each"], rows)


def pieces(instructions: Any) -> list[tuple[int, int]]:
    """First and end of what is carried out as one: runs over the same rows, and products of one input."""
    found, first = [], 0
    while first < len(instructions):
        operation, end = int(instructions[first, 0]), first + 1
        if Operation.COPY <= operation <= Operation.AMAX and instructions[first, MOST_VALUES]:
            end = first + int(instructions[first, MOST_VALUES])
        elif operation == Operation.LINEAR:
            while end < len(instructions) and instructions[end, 0] == Operation.LINEAR and instructions[end, 1]:
                end += 1
        found.append((first, end))
        first = end
    return found


def call(program: Program, instructions: Any, first: int, end: int) -> None:
    """Carry out a part of a step; what is left to PyTorch is skipped."""
    program._replay(
        ctypes.c_void_p(instructions.ctypes.data),
        ctypes.c_int64(end),
        ctypes.c_int64(first),
        ctypes.c_void_p(program._groups.ctypes.data),
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def operator_table(llm: LLM, workload: Workload) -> str:
    """PyTorch's operators, by their own time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        generate(llm, workload)
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40)


if __name__ == "__main__":
    main()
