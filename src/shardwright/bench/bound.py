"""The least time that a workload can take on a machine, whatever the engine.

A step with M tokens reads every weight once and multiplies every token with each of them:

    step(M) = max(weight bytes / read bandwidth, 2 * M * parameters / GEMM rate)

A workload prefills its prompt tokens in one such step (a prefix that they share counts once), which brings each
request's first token, and then decodes one token of every request a step. Attention, and all else that an engine does,
costs nothing here, so no engine reaches all of it. Not covered: experts, which are all counted, although a token passes
through few of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardwright.bench.workloads import Workload
from shardwright.engine.messages import EngineInfo

if TYPE_CHECKING:
    from shardwright.bench.machine import Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What a step reads and multiplies by: all of the model but an embedding that is only looked up in."""

    num_parameters: int
    num_bytes: int

    @classmethod
    def of_engine(cls, info: EngineInfo) -> Weights:
        """The weights of the model that an engine serves."""
        return cls.of_model(
            info.path,
            num_parameters=info.num_parameters,
            weight_bytes=info.weight_bytes,
            vocab_size=info.vocab_size,
        )

    @classmethod
    def of_model(cls, path: str, *, num_parameters: int, weight_bytes: int, vocab_size: int) -> Weights:
        """The same from numbers.

        Args:
            path: the model's directory, empty for code that has none.
            num_parameters, weight_bytes: of the whole model.
        """
        looked_up = lookup_parameters(path, vocab_size)
        return cls(
            num_parameters=num_parameters - looked_up,
            num_bytes=weight_bytes - round(looked_up * weight_bytes / num_parameters),
        )


def lookup_parameters(path: str, vocab_size: int) -> int:
    """Parameters of the input embedding, or 0 where the head shares them and so multiplies by them."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError):  # a model with code of its own: count everything
        return 0
    tied = getattr(config, "tie_word_embeddings", True)
    return 0 if tied else vocab_size * getattr(config, "hidden_size", 0)


def step_seconds(num_tokens: int, weights: Weights, machine: Machine) -> float:
    """The least time of one step with this many tokens."""
    read_s = weights.num_bytes / (machine.read_gb_per_s * 1e9)
    multiply_s = 2 * num_tokens * weights.num_parameters / (machine.gemm_gflop_per_s * 1e9)
    return max(read_s, multiply_s)


def workload_seconds(workload: Workload, weights: Weights, machine: Machine) -> float:
    """The least time of a workload that starts with a cold prefix cache."""
    repeated = workload.common_tokens * (len(workload.prompts) - 1)
    prefill_s = step_seconds(workload.num_prompt_tokens - repeated, weights, machine)
    decode_s = step_seconds(len(workload.prompts), weights, machine)
    return prefill_s + (workload.output_tokens - 1) * decode_s
