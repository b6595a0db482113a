"""Model directories with modeling code of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.models import modeling_tale
from tests.models.modeling_tale import Tale, TaleConfig
from transformers import PreTrainedModel

CODE = Path(modeling_tale.__file__)


def make_tale(kind: type[PreTrainedModel] = Tale, **config: object) -> PreTrainedModel:
    """A random Tale, or a variation of it, in eval mode, with its own attention."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(TaleConfig(**config)).eval()
    model.set_attn_implementation("eager")
    return model


def write_code(directory: Path, **config: object) -> Path:
    """A directory with Tale's code and config, without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(CODE, directory)
    auto_map = {"AutoConfig": f"{CODE.stem}.TaleConfig", "AutoModelForCausalLM": f"{CODE.stem}.Tale"}
    fields = {"model_type": "tale", "architectures": ["Tale"], "auto_map": auto_map} | config
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def write_tale(directory: Path) -> Path:
    """A whole model directory, without a tokenizer."""
    save_file(make_tale().state_dict(), write_code(directory) / "model.safetensors", metadata={"format": "pt"})
    return directory


@torch.inference_mode()
def greedy_by_recompute(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens by a full forward for each."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
