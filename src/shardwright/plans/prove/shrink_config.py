"""Smaller numbers for a Transformers config, such that a model is cut as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

VOCABULARY_SIZE = 512
"""About as many tokens are left."""

MIN_HEAD_DIM = 8
"""Narrower heads would leave no room for rotary parts."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

WIDTH = re.compile(
    r"(?:\w+_)?(?:hidden_size|intermediate_size|head_dim|lora_rank|d_model|d_ff|d_kv|ffn_dim|ffn_hidden_size|n_embd|"
    r"n_inner|embedding_size|embed_proj_dim|rotary_dim|d_inner|mlp_dim)(?:_\w+)?"
)
"""Names of widths; all of a config's are divided by the same factor."""

HEAD_WIDTH = re.compile(r"\w*head_dim")
HIDDEN = re.compile(r"hidden_size|d_model|n_embd")
HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads")

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")

TOKEN_IDS = re.compile(r"\w*token_(?:id|index)s?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """What is made smaller, beside the vocabulary."""

    layers: bool
    widths: bool
    experts: bool


def shrink_config(config: PretrainedConfig, extent: Extent, *, layers: int | None, tp: int) -> list[str]:
    """Make the numbers of a config smaller, in place.

    Args:
        config: of the whole model.
        extent: what is made smaller.
        layers: how many are left; None: all.
        tp: what divides by this number of ranks, or does not, stays so.

    Returns: what was done, in words; nothing if nothing was.
    """
    text = config.get_text_config()
    notes = []
    if extent.layers and layers is not None:
        notes += _fewer_layers(text, layers)
        for _, part in _parts(config):
            if part is not text:
                _fewer_layers(part, 2)
    if extent.widths:
        notes += _narrower(text, tp)
    if extent.experts:
        notes += _fewer_experts(text, tp)
    return notes + _smaller_vocabulary(config, text, tp) if notes else []


def _fewer_layers(config: PretrainedConfig, layers: int) -> list[str]:
    for name in LAYER_COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count > layers:
            for key, value in list(vars(config).items()):
                if isinstance(value, list) and len(value) == count:
                    setattr(config, key, value[:layers])
            setattr(config, name, layers)
            return [f"{layers} of {count} layers, each kind of them"]
    return []


def _smaller_vocabulary(config: PretrainedConfig, text: PretrainedConfig, tp: int) -> list[str]:
    size = getattr(text, "vocab_size", 0)
    if size <= 2 * VOCABULARY_SIZE:
        return []
    smaller = VOCABULARY_SIZE - VOCABULARY_SIZE % tp + size % tp
    for part in (config, text):
        for name, value in list(vars(part).items()):
            if value == size and "vocab" in name:
                setattr(part, name, smaller)
            elif TOKEN_IDS.fullmatch(name) and isinstance(value, int) and value >= smaller:
                setattr(part, name, smaller - 1)
            elif TOKEN_IDS.fullmatch(name) and isinstance(value, list):
                setattr(part, name, [min(token, smaller - 1) for token in value])
    return [f"{smaller:,} of {size:,} tokens"]


def _narrower(config: PretrainedConfig, tp: int) -> list[str]:
    widths = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 1 and WIDTH.fullmatch(name)
    }
    factor = next((f for f in (32, 16, 8, 4, 2) if _fits(config, widths, f, tp)), 1)
    if factor == 1:
        return []
    for name, value in widths.items():
        setattr(config, name, value // factor)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := vars(config).get(name), dict):
            setattr(config, name, _narrower_rope(rope, factor))
    return [f"widths divided by {factor}, numbers of heads as they are"]


def _fits(config: PretrainedConfig, widths: dict[str, int], factor: int, tp: int) -> bool:
    """Whether widths can be divided by a factor, and the smaller ones divide by the ranks if they did before."""
    counts = (getattr(config, name, None) for name in HEAD_COUNTS)
    heads = next((n for n in counts if isinstance(n, int) and n), 1)
    head_widths = [value for name, value in widths.items() if HEAD_WIDTH.fullmatch(name)]
    if not head_widths:
        head_widths = [next((v for name, v in widths.items() if HIDDEN.fullmatch(name)), 0) // heads]
    return (
        bool(widths)
        and min(head_widths) // factor >= MIN_HEAD_DIM
        and all(value % factor == 0 and value // factor >= MIN_HEAD_DIM for value in widths.values())
        and all((value // factor % tp == 0) == (value % tp == 0) for value in widths.values())
    )


def _narrower_rope(parameters: dict[str, Any], factor: int) -> dict[str, Any]:
    """Rotary settings have lists with a number for each pair of features, or with numbers of such pairs."""
    smaller: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            smaller[name] = _narrower_rope(value, factor)
        elif isinstance(value, list) and name.endswith("_factor"):
            smaller[name] = value[: len(value) // factor]
        elif isinstance(value, list) and name.endswith("section"):
            smaller[name] = [pairs // factor for pairs in value]
        else:
            smaller[name] = value
    return smaller


def _fewer_experts(config: PretrainedConfig, tp: int) -> list[str]:
    for name in EXPERT_COUNTS:
        count = getattr(config, name, None)
        if not isinstance(count, int) or count < 2:
            continue
        per_token = (getattr(config, key, None) for key in EXPERTS_PER_TOKEN)
        chosen = next((n for n in per_token if isinstance(n, int)), 1)
        groups = int(getattr(config, "n_group", None) or 1)
        least = max(4 * tp, 2 * chosen, 4 * groups)
        fewer = count
        while fewer % 2 == 0 and fewer // 2 >= least and (fewer // 2 % tp == 0) == (count % tp == 0):
            fewer //= 2
        if fewer < count:
            setattr(config, name, fewer)
            return [f"{fewer} of {count} experts"]
    return []


def _parts(config: PretrainedConfig) -> Iterator[tuple[str, PretrainedConfig]]:
    """Configs within a config."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield name, value
