"""Code that the user names on the command line, served by every command that takes a model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
import torch
from tests.models.plain_models import CODE, greedy, make_gpt, write_folder

if TYPE_CHECKING:
    from tests.cli.conftest import Result

Shardwright: TypeAlias = "Callable[..., Result]"

PROMPT = [1, 2, 3, 4, 5]
NUM_TOKENS = 12


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current directory with the code in a module, and a checkpoint whose names are not the module's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "handmade", raising=False)
    shutil.copy(CODE, tmp_path / "handmade.py")
    torch.save({"model": {f"net.{k}": v for k, v in make_gpt().state_dict().items()}}, tmp_path / "ckpt.pt")
    (tmp_path / "names.yaml").write_text('"^net[.]": ""')


@pytest.mark.usefixtures("here")
def test_function_is_named_and_its_weights_renamed(shardwright: Shardwright) -> None:
    expected = greedy(make_gpt(), PROMPT, NUM_TOKENS)
    common = ("handmade:HandmadeGPT", "--weights", "ckpt.pt")
    greedily = ("--temperature", "0", "--max-tokens", str(NUM_TOKENS), "--kv-cache-memory-bytes", "1MiB")
    prompt = ("--prompt-token-ids", ",".join(map(str, PROMPT)))
    failed = shardwright("run", *common, *greedily, *prompt)
    assert failed.code == 2
    assert "names in" in failed.stderr
    assert "are not those of HandmadeGPT" in failed.stderr
    result = shardwright("run", *common, "--weight-map", "names.yaml", *greedily, *prompt, "--json")
    assert result.json["requests"][0]["outputs"][0]["token_ids"] == expected
    result = shardwright("run", *common, "--weight-map", "names.yaml", *greedily, *prompt)
    assert result.stdout.split() == [str(token) for token in expected]
    report = shardwright("inspect", *common, "--weight-map", "names.yaml", "--json").json
    assert report["attention"]["rung"] == "dataflow"
    assert (report["model_type"], report["architecture"], report["num_layers"]) == ("custom", "HandmadeGPT", 2)
    assert shardwright("inspect", *common, "--weight-map", "names.yaml").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("handmade:HandmadeGTP",), "error: handmade has no function HandmadeGTP: did you mean HandmadeGPT?"),
        (("handmad:HandmadeGPT",), "error: there is no module 'handmad' in"),
        (
            ("handmade:Attention",),
            "error: handmade:Attention: the vocabulary of Attention cannot be told: its forward fails",
        ),
        (("handmade:VOCAB",), "error: handmade: VOCAB is a int, not a function that returns a module"),
        (
            ("handmade:build_model",),
            "error: handmade:build_model takes folder: name the folder of its weights with --weights",
        ),
        (("handmade:HandmadeGPT", "--weights", "no.pt"), "error: no weights at"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_is_wrong_is_one_line(shardwright: Shardwright, arguments: tuple[str, ...], message: str) -> None:
    result = shardwright("run", *arguments, "--prompt-token-ids", "1", "--max-model-len", "64")
    assert result.code == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(message)


def test_folder_needs_permission(shardwright: Shardwright, tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "gpt"))
    result = shardwright("inspect", folder)
    assert (result.code, result.stdout) == (2, "")
    assert "brings its own code (factory.py), which would run on this machine" in result.stderr
    assert shardwright("inspect", folder, "--trust-remote-code", "--json").json["vocab_size"] == 96
