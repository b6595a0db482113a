"""Functions that make a model are found, called with what they take, and what goes wrong in them is one clear line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from shardwright.errors import ModelSourceError, UnsupportedModelError, UsageError
from shardwright.models.factory import Factory, folder_factory, named_factory


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory, from which modules are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in sys.modules.keys() - before:
        del sys.modules[name]


def write(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(("from torch import nn", *lines)))
    return file


def make(function: object, folder: Path | None = None, *, takes_folder: bool = False) -> nn.Module:
    assert callable(function)
    return Factory(label="the factory", function=function, folder=folder, takes_folder=takes_folder)().module


def test_named_function_is_imported_from_the_current_directory(here: Path) -> None:
    write(here / "inkwell.py", "def make(): return nn.Linear(2, 3)", "class Deep: make = staticmethod(make)")
    assert isinstance(named_factory("inkwell:make")().module, nn.Linear)
    assert isinstance(named_factory("inkwell:Deep.make")().module, nn.Linear)
    write(here / "quill" / "nib" / "tip.py", "class Tip(nn.Linear):", "    def __init__(self): super().__init__(2, 3)")
    assert type(named_factory("quill.nib.tip:Tip")().module).__name__ == "Tip"


def test_folder_is_given_to_functions_that_take_it(tmp_path: Path) -> None:
    seen: list[object] = []

    def takes_nothing() -> nn.Module:
        return nn.Linear(1, 1)

    def takes_path(path: str) -> nn.Module:
        seen.append(path)
        return nn.Linear(1, 1)

    def may_take_it(depth: int = 2, *, checkpoint_dir: str | None = None) -> nn.Module:
        seen.append((depth, checkpoint_dir))
        return nn.Linear(1, 1)

    for function in (takes_nothing, takes_path, may_take_it):
        make(function, tmp_path)
    assert seen == [str(tmp_path), (2, str(tmp_path))]
    make(may_take_it)
    assert seen[-1] == (2, None)


def test_by_convention_the_one_argument_is_the_folder_whatever_its_name(tmp_path: Path) -> None:
    seen: list[object] = []

    def build_model(where, /, device="cpu"):  # type: ignore[no-untyped-def]
        seen.append((where, device))
        return nn.Linear(1, 1)

    def starred(*args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append((args, kwargs))
        return nn.Linear(1, 1)

    def optional(device="cpu"):  # type: ignore[no-untyped-def]
        seen.append(device)
        return nn.Linear(1, 1)

    for function in (build_model, starred, optional):
        make(function, tmp_path, takes_folder=True)
    assert seen == [(str(tmp_path), "cpu"), ((str(tmp_path),), {}), "cpu"]


@pytest.mark.parametrize(
    ("lines", "needs"),
    [
        ("def make(config): ...", "config"),
        ("class make(nn.Module):\n    def __init__(self, width, *, depth): ...", "width, depth"),
    ],
)
def test_function_that_needs_more_says_what(here: Path, lines: str, needs: str) -> None:
    write(here / "needy.py", lines)
    with pytest.raises(ModelSourceError, match=f"needy:make needs {needs}, which nobody gives it: let it take nothing"):
        named_factory("needy:make", here)()


def test_function_that_needs_the_folder_names_the_option(here: Path) -> None:
    write(here / "needy.py", "def make(path): ...")
    with pytest.raises(ModelSourceError, match="takes path: name the folder of its weights with --weights"):
        named_factory("needy:make")()


def test_pair_with_what_cannot_be_seen() -> None:
    made = Factory(label="f", function=lambda: (nn.Linear(1, 1), {"vocab_size": 7, "eos_token_ids": [3]}))()
    assert made.info == {"vocab_size": 7, "eos_token_ids": [3]}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_wrappers_are_taken_off() -> None:
    inner = nn.Linear(1, 1)
    assert make(lambda: torch.compile(inner)) is inner
    assert make(lambda: nn.DataParallel(inner)) is inner


def test_default_type_that_a_factory_sets_is_set_back() -> None:
    def make_half() -> nn.Module:
        torch.set_default_dtype(torch.float16)
        return nn.Linear(1, 1)

    assert next(make(make_half).parameters()).dtype is torch.float16
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: None, "the factory returned a NoneType, but must return an nn.Module, or a pair of one and a dict"),
        (lambda: {"weight": 1}, "returned a dict, but must return"),
        (lambda: (nn.Linear(1, 1), 3), "returned a tuple, but must return"),
        (lambda: nn.Linear, "returned the class Linear, but must return"),
        (lambda: (nn.Linear(1, 1), {"vocabsize": 3}), "unknown key 'vocabsize': did you mean vocab_size"),
        (lambda: (nn.Linear(1, 1), {"color": 3}), "unknown key 'color': there are vocab_size, max_model_len"),
        (lambda: 1 / 0, r"the factory failed: ZeroDivisionError: division by zero \(.*test_factory\.py:\d+\)"),
        (lambda: sys.exit("no GPU"), r"the factory failed: SystemExit: no GPU \("),
    ],
)
def test_answer_that_is_no_module_is_named(function: object, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        make(function)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("inkwel:make", r"there is no module 'inkwel' in .*, nor is it installed: did you mean inkwell\?"),
        ("zzz:make", r"there is no module 'zzz' in .*, nor is it installed$"),
        ("desk.drawr:make", r"there is no module 'desk.drawr' in the package desk: did you mean desk\.drawer\?"),
        ("inkwell.deeper:make", "there is no module 'inkwell.deeper'"),
        ("inkwell:mak", r"inkwell has no function mak: did you mean make\?"),
        ("inkwell:something", "inkwell has no function something: it defines make, Pen"),
        ("inkwell:Pen.nib", "inkwell has no function Pen.nib: "),
        ("inkwell:SIZE", "inkwell: SIZE is a int, not a function that returns a module"),
    ],
)
def test_name_that_leads_nowhere_gets_the_nearest(here: Path, reference: str, message: str) -> None:
    write(here / "inkwell.py", "SIZE = 3", "def make(): ...", "class Pen: ...")
    write(here / "desk" / "__init__.py")
    write(here / "desk" / "drawer.py")
    with pytest.raises(ModelSourceError, match=message):
        named_factory(reference)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import torch_scatterer.ops",
            r"needs the package 'torch_scatterer', which is not installed \(.*\.py:2\): pip inst",
        ),
        ("def f(:", r"importing .* fails: SyntaxError: invalid syntax \(.*\.py:2\)"),
        ("x = {}['key']", r"importing .* fails: KeyError: 'key' \(.*\.py:2\)"),
        ("raise SystemExit(3)", r"importing .* fails: SystemExit: 3 \(.*\.py:2\)"),
        ("from torch import nothing_like_this", r"importing .* fails: ImportError: cannot import name 'nothing_like"),
    ],
)
def test_code_that_cannot_be_imported_is_named(here: Path, code: str, message: str) -> None:
    write(here / "broken.py", code, "def build_model(path): ...")
    with pytest.raises(ModelSourceError, match=message):
        named_factory("broken:build_model")
    (here / "broken.py").rename(here / "factory.py")
    with pytest.raises(ModelSourceError, match=message):
        folder_factory(here)


def test_errors_are_one_line(here: Path) -> None:
    write(here / "factory.py", "def build_model(path): raise ValueError('one\\ntwo')")
    with pytest.raises(UsageError, match="one two") as caught:
        folder_factory(here)()
    assert "\n" not in str(caught.value)


def test_folder_without_the_function_says_which(here: Path) -> None:
    write(here / "factory.py", "def build_modle(path): ...")
    with pytest.raises(ModelSourceError, match=r"factory\.py has no function build_model: did you mean build_modle\?"):
        folder_factory(here)


def test_factories_import_what_lies_beside_them(tmp_path: Path) -> None:
    """Also two of them whose files are called the same, and when the function runs."""
    for name, width in (("one", 2), ("two", 3)):
        write(tmp_path / name / "net.py", f"WIDTH = {width}")
        write(tmp_path / name / "late.py", f"HEIGHT = {width}")
        write(tmp_path / name / "factory.py", "from net import WIDTH", "def build_model(path):",
              "    from late import HEIGHT", "    return nn.Linear(WIDTH, HEIGHT)")  # fmt: skip
    path = list(sys.path)
    first, second = folder_factory(tmp_path / "one"), folder_factory(tmp_path / "two")
    for factory, width in ((first, 2), (second, 3), (first, 2)):
        module = factory().module
        assert isinstance(module, nn.Linear)
        assert (module.in_features, module.out_features) == (width, width)
    assert sys.path == path
