"""Everything to know about a model on a GPU, in one command: is it right, how near the bound is it, where does time go.

    python benchmarks/gpu.py                                   the starter model, random weights of 1B and 8B
    python benchmarks/gpu.py MODEL ... [--json FILE]           these models
    python benchmarks/gpu.py --device cpu --tiny               a smoke test: a tiny model, a few tokens

Per model: the greedy tokens and the logits' differences against Hugging Face in eager mode; one request's decode step
against the time that reading the weights takes; tokens per second of many requests at once, with graphs and without,
planned ahead and not; and the time of each stage of a decode step. Random weights stand for models that are not here:
`--shape 1b` writes the config of a model and lets weights be drawn at load.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from shardwright import LLM, SamplingParams
from shardwright.bench.machine import read_gb_per_s
from shardwright.models.resolve import resolve_model

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""Llamas."""

PROMPT_LENGTHS = (5, 33, 130)
"""Of the prompts that are compared with Hugging Face."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    compared_tokens: int
    decode_tokens: int
    requests: int
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, *, is_tiny: bool) -> Sizes:
        return cls(4, 8, 4, 8, 4) if is_tiny else cls(32, 256, 256, 128, 128)

    @property
    def longest(self) -> int:
        """Most tokens of a sequence."""
        measured = self.prompt_tokens + max(self.decode_tokens, self.output_tokens)
        return max(measured, max(PROMPT_LENGTHS) + self.compared_tokens)


@dataclass(frozen=True)
class Decode:
    """Steps of one request."""

    step_ms: float
    bound_ms: float
    """Of reading the weights once."""

    @property
    def fraction(self) -> float:
        return self.bound_ms / self.step_ms


VARIANTS: dict[str, dict[str, Any]] = {
    "graphs": {"async_scheduling": True},
    "not ahead": {"async_scheduling": False},
    "eager": {"enforce_eager": True},
    "compiled": {"compile_layers": True},
}
"""Options of the engine, by what they show; "not ahead": with graphs, but each step planned once the last is done."""


def write_shape(name: str, directory: Path) -> Path:
    """A model directory without weights."""
    config = LlamaConfig(
        **SHAPES[name],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    return directory


def prompt(i: int, length: int, vocab_size: int) -> dict[str, Any]:
    """Token ids by a rule, as the standard workloads have them, for any vocabulary."""
    return {"prompt_token_ids": [(7 * i + 13 * j) % (vocab_size - 100) + 100 for j in range(length)]}


def compare(path: str, engine: dict[str, Any], sizes: Sizes, device: str) -> dict[str, Any]:
    """Greedy tokens and their log-probabilities against Hugging Face in eager mode, prompt by prompt, in float32.

    A checkpoint is needed: random weights are drawn anew by each.
    """
    params = SamplingParams(temperature=0, max_tokens=sizes.compared_tokens, ignore_eos=True, logprobs=1)
    with LLM(path, **(engine | {"dtype": "float32"})) as llm:
        prompts = [prompt(i, length, llm.info.vocab_size) for i, length in enumerate(PROMPT_LENGTHS)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").to(device)
    equal, largest = 0, 0.0
    for asked, output in zip(prompts, outputs, strict=True):
        token_ids = output.outputs[0].token_ids
        tokens = torch.tensor([asked["prompt_token_ids"] + token_ids], device=device)
        with torch.inference_mode():
            scores = model(tokens).logits[0, -len(token_ids) - 1 : -1].float().log_softmax(-1)
        equal += scores.argmax(-1).tolist() == token_ids
        for place, (token_id, listed) in enumerate(zip(token_ids, output.outputs[0].logprobs or [], strict=True)):
            largest = max(largest, abs(float(scores[place, token_id]) - listed[token_id].logprob))
    return {"prompts": len(prompts), "equal": equal, "largest_logprob_difference": largest}


def decode_alone(llm: LLM, sizes: Sizes, gb_per_s: float) -> Decode:
    """One request: the time of a step, of the longer part of two runs less the shorter, against the bound."""
    asked = prompt(0, sizes.prompt_tokens, llm.info.vocab_size)

    def seconds(num_tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            llm.generate([asked], params, use_tqdm=False)
            best = min(best, time.perf_counter() - start)
        return best

    few = sizes.decode_tokens // 4
    step_s = (seconds(sizes.decode_tokens) - seconds(few)) / (sizes.decode_tokens - few)
    return Decode(step_ms=1e3 * step_s, bound_ms=llm.info.weight_bytes / gb_per_s / 1e6)


def throughput(llm: LLM, sizes: Sizes) -> float:
    """Output tokens per second of many requests at once."""
    asked = [prompt(i, sizes.prompt_tokens, llm.info.vocab_size) for i in range(sizes.requests)]
    params = SamplingParams(temperature=0, max_tokens=sizes.output_tokens, ignore_eos=True)
    llm.generate(asked, params, use_tqdm=False)
    start = time.perf_counter()
    llm.generate(asked, params, use_tqdm=False)
    return sizes.requests * sizes.output_tokens / (time.perf_counter() - start)


def stages(llm: LLM, sizes: Sizes) -> list[dict[str, Any]]:
    """Where the time of decode steps goes: the kernels, or on a CPU the operators, that take most of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = llm.info.device.startswith("cuda")
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    params = SamplingParams(temperature=0, max_tokens=sizes.compared_tokens, ignore_eos=True)
    asked = prompt(0, sizes.prompt_tokens, llm.info.vocab_size)
    with torch.profiler.profile(activities=activities) as profile:
        llm.generate([asked], params, use_tqdm=False)
    total = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: getattr(event, total), reverse=True)
    return [{"name": event.key[:80], "calls": event.count, "ms": getattr(event, total) / 1e3} for event in events[:20]]


def measure(name: str, engine: dict[str, Any], sizes: Sizes, *, device: str, gb_per_s: float) -> dict[str, Any]:
    """All of one model: a shape of `SHAPES`, or any other that the engine takes."""
    result: dict[str, Any] = {"model": name}
    with tempfile.TemporaryDirectory() as folder:
        path = name
        if name in SHAPES:
            path = str(write_shape(name, Path(folder)))
            engine = engine | {"load_format": "dummy"}
        else:
            path = str(resolve_model(name))
            result["correctness"] = compare(path, engine, sizes, device)
        for label, more in VARIANTS.items():
            free_memory()
            with LLM(path, **(engine | more)) as llm:
                alone = decode_alone(llm, sizes, gb_per_s)
                result[label] = {
                    **asdict(alone),
                    "fraction_of_bound": alone.fraction,
                    "output_tokens_per_s": throughput(llm, sizes),
                    "requests": sizes.requests,
                    "attention_backend": llm.info.attention_backend,
                    "stages": stages(llm, sizes),
                }
    return result


def free_memory() -> None:
    """Of the engine before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(result: dict[str, Any]) -> None:
    """A few lines of what was measured."""
    print(result["model"])
    if (found := result.get("correctness")) is not None:
        print(
            f"  tokens of {found['equal']} of {found['prompts']} prompts equal Hugging Face's in float32, "
            f"log-probabilities differ by {found['largest_logprob_difference']:.2g} at most"
        )
    for label in VARIANTS:
        run = result[label]
        print(
            f"  {label:12} decode step {run['step_ms']:.3f} ms, {run['fraction_of_bound']:.0%} of the bound; "
            f"{run['requests']} requests {run['output_tokens_per_s']:,.0f} tok/s, by {run['attention_backend']} kernels"
        )
        for stage in run["stages"][:8]:
            print(f"            {stage['ms']:9.3f} ms {stage['calls']:6} x {stage['name']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure models one after another. Returns 1 if one of them does not give Hugging Face's tokens."""
    parser = argparse.ArgumentParser(description="What there is to know about models on a GPU.")
    parser.add_argument("models", nargs="*", help=f"directories, names, or shapes: {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a few tokens of a tiny model, as a smoke test")
    parser.add_argument("--json", type=Path, help="write everything here too")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    sizes = Sizes.of(is_tiny=options.tiny)
    models = options.models or (["tiny"] if options.tiny else ["smollm2-135m", "1b", "8b"])
    engine = {"device": options.device, "max_num_seqs": sizes.requests, "max_model_len": sizes.longest}
    gb_per_s = read_gb_per_s(options.device)
    print(f"{options.device}: {gb_per_s:,.0f} GB/s read, torch {torch.__version__}")
    results = []
    for name in models:
        results.append(measure(name, engine, sizes, device=options.device, gb_per_s=gb_per_s))
        show(results[-1])
    if options.json is not None:
        options.json.write_text(json.dumps({"gb_per_s": gb_per_s, "results": results}, indent=1))
    wrong = [found for found in (result.get("correctness") for result in results) if found]
    return int(any(found["equal"] < found["prompts"] for found in wrong))


if __name__ == "__main__":
    raise SystemExit(main())
