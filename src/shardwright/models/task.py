"""What a model is for: its config names the class it was saved from, and the class has a head or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from shardwright.config import Task

MODULES_FILE = "modules.json"
"""Where sentence-transformers lists what a model is put together from."""


def resolve_task(asked: Task, config: PretrainedConfig, path: Path) -> Task:
    """What to do with a model: as asked, else what it was saved for. Never "auto".

    Args:
        asked: by the user.
        config: of the model.
        path: its directory.

    Returns: "classify" for a classifier of texts, "embed" for what has no head or one that fills in masks, and for
        every model of sentence-transformers; else "generate".
    """
    if asked != "auto":
        return asked
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith("ForSequenceClassification") or name == _own(config, "AutoModelForSequenceClassification"):
        return "classify"
    if (path / MODULES_FILE).is_file():
        return "embed"
    if name in _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or name == _own(config, "AutoModelForCausalLM"):
        return "generate"
    if name in (_own(config, "AutoModel"), _own(config, "AutoModelForMaskedLM")):
        return "embed"
    headless = _names(MODEL_MAPPING_NAMES) | _names(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES)
    to_fill_in = _names(MODEL_FOR_MASKED_LM_MAPPING_NAMES) | _names(MODEL_FOR_PRETRAINING_MAPPING_NAMES)
    is_seq2seq = name.endswith("ForConditionalGeneration")
    return "embed" if name in headless | to_fill_in and not is_seq2seq else "generate"


def _names(mapping: Mapping[str, str | Sequence[str]]) -> set[str]:
    """Names of all classes of a mapping; some model types have several."""
    listed = ((names,) if isinstance(names, str) else names for names in mapping.values())
    return {name for names in listed for name in names}


def _own(config: PretrainedConfig, auto_class: str) -> str | None:
    """Name of the class that the directory's own code has for an Auto class."""
    reference = (getattr(config, "auto_map", None) or {}).get(auto_class)
    return reference.rpartition(".")[2] if isinstance(reference, str) else None
