"""Transformers knows its classes from the cache as it does from its files, whatever became of the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = """
import transformers.models
print(sorted(dir(transformers)), sorted(dir(transformers.models)))
"""
SCRIPT = (
    """
import sys
from shardwright.foreign_models import remember_model_names
remember_model_names()
remember_model_names()
"""
    + NAMES
    + """
assert not any("shardwright" in type(finder).__module__ for finder in sys.meta_path), "it is needed once"
"""
)
HOMELESS = """
import os
import pathlib
os.environ.clear()
def expanduser(path):
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.expanduser = expanduser
"""
SEARCHED = """
import transformers.utils.import_utils as module
assert module.define_import_structure.__module__ == "shardwright.foreign_models"
"""


@pytest.fixture(scope="module")
def expected() -> str:
    """The names that there are without a cache."""
    return output_of(NAMES, Path("/"))


def output_of(script: str, cache: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SHARDWRIGHT_CACHE": str(cache)},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, expected: str) -> Path:
    """A cache after the first time."""
    cache = tmp_path_factory.mktemp("cache")
    assert output_of(SCRIPT + SEARCHED, cache) == expected
    return cache


def test_names_are_those_of_a_search_the_first_time_and_later(filled: Path, expected: str) -> None:
    written = {file: file.stat().st_mtime_ns for file in filled.glob("transformers/*/*.json")}
    assert len(written) == 2, "of the package, and of its models"
    assert output_of(SCRIPT + SEARCHED, filled) == expected
    assert written == {file: file.stat().st_mtime_ns for file in written}, "nothing was searched"


@pytest.mark.parametrize("contents", [("", "[]"), ('[["a", "b"]]', "7")])
def test_a_file_that_is_none_is_written_anew(
    contents: tuple[str, str], filled: Path, tmp_path: Path, expected: str
) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    files = sorted(tmp_path.glob("transformers/*/*.json"))
    whole = [file.read_text() for file in files]
    for file, content in zip(files, contents, strict=True):
        file.write_text(content)
    assert output_of(SCRIPT, tmp_path) == expected
    assert [file.read_text() for file in files] == whole


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, expected: str) -> None:
    (tmp_path / "transformers").write_text("a file where the folder should be")
    assert output_of(SCRIPT, tmp_path) == expected


def test_without_a_home_it_is_done_without(expected: str) -> None:
    assert output_of(HOMELESS + SCRIPT, Path("/")) == expected


def test_files_that_somebody_works_on_are_read_each_time(tmp_path: Path) -> None:
    """A package beside which no installer left its record."""
    package = tmp_path / "transformers"
    (package / "models").mkdir(parents=True)
    (package / "utils").mkdir()
    (package / "utils" / "__init__.py").write_text("")
    (package / "utils" / "import_utils.py").write_text("def define_import_structure(path, prefix=None): return 'read'")
    (package / "__init__.py").write_text(
        "from .utils.import_utils import define_import_structure\nfound = define_import_structure(__file__)"
    )
    script = f"""
import sys
from shardwright.foreign_models import remember_model_names
remember_model_names()
sys.path.insert(0, {str(tmp_path)!r})
import transformers
assert transformers.__file__.startswith({str(tmp_path)!r})
print(transformers.found, transformers.define_import_structure.__module__)
"""
    assert output_of(script, tmp_path / "cache").split() == ["read", "transformers.utils.import_utils"]
