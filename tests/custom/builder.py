"""Model directories from the modeling files of this folder, with weights that make good tests and known answers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.conftest import build_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shardwright.adapt.arguments import plain_arguments
from shardwright.adapt.eager import eager
from shardwright.adapt.logits import logits_of

MODELS = Path(__file__).parent / "models"

PROMPT_LENGTHS = (5, 17, 33, 48)
NUM_TOKENS = 12
VOCAB_SIZE = 128
WIDTH = 64

MIN_GAP = 1e-3
"""Least distance between the best two logits of a step; float32 noise is some hundred times smaller."""
MIN_DISTINCT = 4
"""Different tokens among the 12 of a prompt, on average."""
MAX_SEEDS = 8


@dataclass(frozen=True)
class Reference:
    """What full forward passes of the plain model give, in float32."""

    path: Path
    prompts: list[list[int]]
    outputs: list[list[int]]


def build(source: Path, directory: Path) -> Reference:
    """Write a model directory with the first seed that is good; its answers are those of the reloaded model."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("__pycache__"))
    build_tokenizer().save_pretrained(directory)
    for seed in range(MAX_SEEDS):
        save_weights(directory, seed)
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
        if (outputs := _good_outputs(model)) is not None:
            return Reference(directory, [prompt(length) for length in PROMPT_LENGTHS], outputs)
    raise AssertionError(f"{source.name}: none of {MAX_SEEDS} seeds gives clear tokens")


@torch.no_grad()
def save_weights(directory: Path, seed: int) -> None:
    """Draw a directory's weights."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(_drawn(module, name, parameter))
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _drawn(module: nn.Module, name: str, old: Tensor) -> Tensor:
    """New values of one parameter: at unit gain, and norms with random signs."""
    noise = torch.randn_like(old)
    if isinstance(module, nn.Embedding) or name.startswith(("embed", "pos")):
        return noise
    if old.ndim >= 2:
        return noise * 1.3 / WIDTH**0.5
    if "norm" in type(module).__name__.lower() and name == "weight":
        return noise.sign() * (1 + 0.1 * noise)
    return 0.1 * noise


def prompt(length: int) -> list[int]:
    """Token ids of the fixed prompt of this length, special tokens left out."""
    return [4 + (17 * length + 29 * j * j + 7 * j) % (VOCAB_SIZE - 4) for j in range(length)]


def _good_outputs(model: PreTrainedModel) -> list[list[int]] | None:
    """Greedy tokens for each prompt; None if the model makes no good test."""
    outputs = []
    for length in PROMPT_LENGTHS:
        tokens, gap = generate(model, prompt(length))
        if gap < MIN_GAP:
            return None
        outputs.append(tokens)
    if sum(len(set(tokens)) for tokens in outputs) < MIN_DISTINCT * len(outputs):
        return None
    longest = prompt(PROMPT_LENGTHS[-1])
    with_another_beginning = longest[20:40] + longest[20:]
    return None if generate(model, with_another_beginning)[0] == outputs[-1] else outputs


@eager
@torch.inference_mode()
def generate(model: nn.Module, token_ids: list[int]) -> tuple[list[int], float]:
    """Greedy tokens by a full forward for each, and the least distance between the best two logits."""
    tokens, least_gap = list(token_ids), float("inf")
    for _ in range(NUM_TOKENS):
        input_ids = torch.tensor([tokens])
        best = logits_of(model(input_ids, **plain_arguments(model, input_ids)))[0, -1].topk(2)
        least_gap = min(least_gap, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(token_ids) :], least_gap
