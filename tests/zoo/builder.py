"""Tiny models with weights that make good tests, and what Hugging Face generates with them.

Random weights as constructors draw them make poor ones: attention is uniform, a tied head repeats the last token for
ever, and an engine could ignore half of the model unpunished. Here every matrix is drawn at unit gain, norms get random
signs, and a model whose tokens are unclear, monotonous or blind to what came long before is drawn anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.conftest import build_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

PROMPT_LENGTHS = (5, 17, 33, 48)
NUM_TOKENS = 16
VOCAB_SIZE = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_embd": 64, "num_hidden_layers": 2, "n_layer": 2,
    "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    "ffn_dim": 96, "n_inner": 96, "max_position_embeddings": 256, "n_positions": 256, "sliding_window": 16,
    "word_embed_proj_dim": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "attention_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip

MIN_GAP = 5e-4
"""Least distance between the best two logits of a step; float32 noise is some hundred times smaller."""
MIN_DISTINCT = 6
"""Different tokens among the 16 of a prompt, on average."""
MAX_SEEDS = 12


@dataclass(frozen=True)
class Reference:
    """What Hugging Face `generate` gives in float32, with its cache, for each prompt alone."""

    path: Path
    prompts: list[list[int]]
    outputs: list[list[int]]


def build(model_type: str, fields: dict[str, Any], directory: Path) -> Reference:
    """Write a model directory with the first seed that is good. Raises AssertionError if none is."""
    config = make_config(model_type, fields)
    for seed in range(MAX_SEEDS):
        model = draw(config, seed)
        reference = _reference(model, directory)
        if reference is not None:
            model.save_pretrained(directory)
            build_tokenizer().save_pretrained(directory)
            return reference
    raise AssertionError(f"{model_type}: none of {MAX_SEEDS} seeds gives clear tokens")


def make_config(model_type: str, fields: dict[str, Any]) -> PretrainedConfig:
    """The config class's defaults, made small where it has the field, then `fields`."""
    config_class = CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    sizes = {name: SIZES[name] for name in SIZES.keys() & known if not isinstance(known[name], list | dict)}
    if known.get("layer_types"):
        sizes |= {"num_hidden_layers": 4, "layer_types": _every_kind(known["layer_types"])}
    return config_class(**(sizes | {"eos_token_id": None} | fields))


def _every_kind(layer_types: list[str]) -> list[str]:
    """Four layers with each kind that occurs, in turns."""
    kinds = list(dict.fromkeys(layer_types))
    return [kinds[i % len(kinds)] for i in range(4)]


@torch.no_grad()
def draw(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model of the config with all weights drawn, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(_drawn(module, f"{path}.{name}", parameter))
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        embedding.weight.mul_(0.25 if head is None or head.weight is embedding.weight else 1.0)
        if head is not None and head.weight is not embedding.weight:
            head.weight.mul_(4)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def _drawn(module: nn.Module, name: str, old: Tensor) -> Tensor:
    """New values of one parameter."""
    noise, kind = torch.randn_like(old), type(module).__name__.lower()
    if isinstance(module, nn.Embedding):
        return noise
    if old.ndim >= 2:
        gain = 1.5 if "att" in name else 1.0  # sharper scores single out few keys
        return noise * gain / math.sqrt(old.shape[0] if kind == "conv1d" else old.shape[-1])
    is_zero = float(old.abs().max()) == 0
    if "norm" in kind and name.endswith("weight"):  # Gemma's norms store the weight minus one
        return noise.sign() * (1 + 0.1 * noise) - float(is_zero)
    if is_zero and "bias" not in name:  # gates and sinks, which training would move from zero
        return noise / 2
    return old + 0.1 * noise


def prompt(length: int) -> list[int]:
    """Token ids of the fixed prompt of this length, special tokens left out."""
    return [4 + (17 * length + 29 * j * j + 7 * j) % (VOCAB_SIZE - 4) for j in range(length)]


def _reference(model: PreTrainedModel, path: Path) -> Reference | None:
    """None if the model makes no good test."""
    prompts = [prompt(length) for length in PROMPT_LENGTHS]
    outputs = []
    for token_ids in prompts:
        tokens, logits = generate(model, token_ids)
        best, second = logits.topk(2).values.unbind(-1)
        if float((best - second).min()) < MIN_GAP:
            return None
        outputs.append(tokens)
    if sum(len(set(tokens)) for tokens in outputs) < MIN_DISTINCT * len(outputs):
        return None
    longest = prompts[-1]
    with_another_beginning = longest[20:40] + longest[20:]
    if generate(model, with_another_beginning)[0] == outputs[-1]:
        return None
    return Reference(path, prompts, outputs)


@torch.inference_mode()
def generate(model: PreTrainedModel, token_ids: list[int]) -> tuple[list[int], Tensor]:
    """Greedy tokens by Hugging Face `generate`, and the logits [NUM_TOKENS, vocab] that they won."""
    settings = GenerationConfig(
        max_new_tokens=NUM_TOKENS, do_sample=False, use_cache=True, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    inputs = torch.tensor([token_ids])
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
    return output.sequences[0, len(token_ids) :].tolist(), torch.cat(output.logits).float()
