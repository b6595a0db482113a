"""What the user types becomes a directory, or an error that says what to type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.errors import ModelSourceError
from shardwright.models.resolve import has_factory, resolve_directory, resolve_model


def test_directory_resolves_to_itself(model_directory: Path) -> None:
    assert resolve_model(str(model_directory)) == model_directory.resolve()


def test_relative_directory_becomes_absolute(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_directory.parent)
    assert resolve_model("storyteller") == model_directory.resolve()


def test_directory_without_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelSourceError, match=r"has no config\.json; it holds model\.safetensors"):
        resolve_model(str(tmp_path))


def test_directory_of_checkpoints_names_one(tmp_path: Path) -> None:
    for step in (100, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").touch()
    with pytest.raises(ModelSourceError, match=r"give .*checkpoint-200"):
        resolve_model(str(tmp_path))


def test_tokenizer_directory_needs_no_config(tmp_path: Path) -> None:
    assert resolve_directory(str(tmp_path)) == tmp_path.resolve()


def test_misspelt_path_gets_the_near_name(model_directory: Path) -> None:
    misspelt = model_directory.with_name("storytelller")
    with pytest.raises(ModelSourceError, match=rf"does not exist: did you mean {model_directory}\?"):
        resolve_model(str(misspelt))


def test_path_far_from_everything_says_what_a_model_can_be(tmp_path: Path) -> None:
    with pytest.raises(
        ModelSourceError, match="does not exist: give a directory, a hub id such as org/name, or smollm2"
    ):
        resolve_model(str(tmp_path / "no" / "such" / "place"))


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M", "smollm2"])
def test_misspelt_starter_gets_the_right_name(name: str) -> None:
    with pytest.raises(ModelSourceError, match=r"there is no model .*: did you mean smollm2-135m\?"):
        resolve_model(name)


def test_file_points_to_its_directory(model_directory: Path) -> None:
    with pytest.raises(ModelSourceError, match=f"is a file: give the directory it lies in, {model_directory}"):
        resolve_model(str(model_directory / "config.json"))


def test_form_that_does_not_work_yet_says_so() -> None:
    with pytest.raises(ModelSourceError, match="GGUF file, which shardwright does not read yet"):
        resolve_model("weights.Q4_0.gguf")


def test_function_is_no_directory() -> None:
    with pytest.raises(ModelSourceError, match="names a function, but a directory or a hub id is needed here"):
        resolve_directory("my_package.models:make_model")


def test_directory_with_a_factory_needs_no_config(tmp_path: Path) -> None:
    (tmp_path / "factory.py").touch()
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    assert has_factory(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{", True),
        ('{"n_layer": 3}', True),
        ("[1]", True),
        ('{"model_type": "llama"}', False),
        ('{"auto_map": {"a": "b"}}', False),
    ],
)
def test_factory_makes_the_model_unless_the_config_is_of_transformers(
    tmp_path: Path, config: str, expected: bool
) -> None:
    (tmp_path / "factory.py").touch()
    (tmp_path / "config.json").write_text(config)
    assert has_factory(tmp_path) is expected


def test_over_long_path_is_a_clear_error() -> None:
    with pytest.raises(ModelSourceError, match="cannot read"):
        resolve_model("/" + "x" * 5000)


def test_hub_id_like_a_misspelt_directory_gets_the_near_name(
    fake_hub: object, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_directory.parent.parent)
    parent = model_directory.parent.name
    with pytest.raises(ModelSourceError, match=rf"not on the hub .*did you mean {parent}/storyteller\?"):
        resolve_model(f"{parent}/storytelller")


def test_resolving_a_directory_imports_nothing_heavy(model_directory: Path) -> None:
    code = (
        "import sys; from shardwright.models.resolve import resolve_model; resolve_model(sys.argv[1]); "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(model_directory)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
