"""Code that cannot be served is refused in one line, which names what failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import build_tokenizer

from shardwright import LLM
from shardwright.errors import CheckpointError, ModelSourceError, UnsupportedModelError, UsageError

CODE = """
import torch
{imports}
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

class BrokenConfig(PretrainedConfig):
    model_type = "broken"

class Broken(PreTrainedModel):
    config_class = BrokenConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 16)
        self.head = nn.Linear(16, config.vocab_size, bias=False)
        {init}
        self.post_init()

    def forward(self, input_ids{arguments}):
        x = self.embed(input_ids)
        {forward}
"""


def write(directory: Path, **parts: str) -> Path:
    """A model directory with parts of its code replaced."""
    parts = {"imports": "", "init": "", "arguments": "", "forward": "return self.head(x)"} | parts
    auto_map = {"AutoConfig": "modeling_broken.BrokenConfig", "AutoModelForCausalLM": "modeling_broken.Broken"}
    config = {"model_type": "broken", "auto_map": auto_map, "vocab_size": 128, "max_position_embeddings": 64}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_broken.py").write_text(CODE.format(**parts))
    weights = {"embed.weight": torch.ones(128, 16), "head.weight": torch.ones(128, 16)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer().save_pretrained(directory)
    return directory


def refusal(directory: Path, error: type[UsageError]) -> str:
    with pytest.raises(error) as caught:
        LLM(str(directory), trust_remote_code=True)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message or "'broken'" in message
    return message


FORWARDS = {
    "raise RuntimeError('no kernel')": "its forward pass fails: RuntimeError: no kernel",
    "raise RuntimeError('no kernel\\nin sight')": "its forward pass fails: RuntimeError: no kernel in sight (",
    "return 'tokens'": "its forward returns str, in which there are no logits",
    "return None": "its forward returns NoneType, in which there are no logits",
    "return {'loss': x.mean()}": "its forward returns dict, in which there are no logits",
    "return x": "its forward returns 16 numbers for a token, but its config has a vocabulary of 128",
    "return self.head(x)[0, 0]": "its forward returns logits of shape (128,), not [1, tokens, vocab]",
    "return self.head(x)[:, ::2]": "its forward returns logits of 5 tokens for 9",
}


@pytest.mark.parametrize(("forward", "reason"), FORWARDS.items(), ids=range(len(FORWARDS)))
def test_a_forward_that_gives_no_logits(forward: str, reason: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, forward=forward), UnsupportedModelError)
    assert f"cannot be served: {reason}" in message


def test_a_forward_that_asks_for_more_than_tokens(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, arguments=", pixels"), UnsupportedModelError)
    assert "missing 1 required positional argument: 'pixels'" in message


def test_a_constructor_that_fails(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, init="raise ValueError('odd size')"), UnsupportedModelError)
    assert message.startswith("the code of 'broken' failed while it built the model: ValueError: odd size (")
    assert "modeling_broken.py:" in message


def test_weights_that_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, init="self.extra = nn.Linear(16, 16)"), CheckpointError)
    assert "lacks 2 weights that Broken needs: extra.bias, extra.weight" in message


@pytest.mark.parametrize("statement", ["import flash_of_tomorrow", "from flash_of_tomorrow.ops import fast"])
def test_a_package_that_is_missing(statement: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, imports=statement), ModelSourceError)
    assert "(modeling_broken.py) cannot be loaded: ImportError" in message
    assert "pip install flash_of_tomorrow" in message


def test_a_module_that_is_missing_from_a_package(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, imports="import torch.of_tomorrow"), ModelSourceError)
    assert "(modeling_broken.py) cannot be loaded: ModuleNotFoundError: No module named 'torch.of_tomorrow'" in message


def test_code_that_is_no_python(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, imports="def broken(:"), ModelSourceError)
    assert "(modeling_broken.py) cannot be loaded: SyntaxError: invalid syntax" in message


def test_code_without_the_class_that_it_shall_have(tmp_path: Path) -> None:
    write(tmp_path)
    code = (tmp_path / "modeling_broken.py").read_text()
    (tmp_path / "modeling_broken.py").write_text(code.replace("class Broken(", "class Mended("))
    assert "no attribute 'Broken'" in refusal(tmp_path, UnsupportedModelError)


def test_code_that_is_not_there(tmp_path: Path) -> None:
    (write(tmp_path) / "modeling_broken.py").unlink()
    assert "(modeling_broken.py) cannot be loaded: OSError" in refusal(tmp_path, ModelSourceError)
