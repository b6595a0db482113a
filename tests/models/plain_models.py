"""Plain modules and the folders they are served from."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_model
from tests.models import factory_gpt
from tests.models.factory_gpt import HandmadeGPT
from torch import nn

CODE = Path(factory_gpt.__file__)


def make_gpt() -> HandmadeGPT:
    """A random module, always the same, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HandmadeGPT().eval()  # type: ignore[no-untyped-call]


def write_folder(folder: Path) -> Path:
    """A folder with factory.py and weights, without a tokenizer or a config."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(CODE, folder / "factory.py")
    save_model(make_gpt(), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


@torch.inference_mode()
def greedy(model: nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens by a full forward of the module for each."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def equal_state(actual: nn.Module, expected: nn.Module) -> bool:
    """Whether two modules have the same parameters and buffers, to the last bit."""
    ours, theirs = actual.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
