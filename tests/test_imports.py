"""Who may import whom: the arrows of docs/architecture.md point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardwright

PACKAGE = Path(shardwright.__file__).parent

LEAVES = {
    "errors",
    "paths",
    "config",
    "weight_format",
    "sampling_params",
    "outputs",
    "engine.messages",
    "foreign_errors",
    "foreign_imports",
    "foreign_models",
    "garbage",
}
"""Plain records that anybody may import; among themselves they follow MAY_IMPORT."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "foreign_errors": set(),
    "foreign_imports": set(),
    "foreign_models": {"paths"},
    "garbage": set(),
    "paths": set(),
    "config": {"errors", "weight_format"},
    "weight_format": set(),
    "sampling_params": {"errors"},
    "outputs": set(),
    "engine.messages": {"outputs", "sampling_params"},
    "loading": LEAVES | {"plans"},
    "models": LEAVES | {"loading"},
    "cache": LEAVES,
    "kernels": LEAVES,
    "layers": LEAVES | {"kernels"},
    "attention": LEAVES | {"cache", "kernels"},
    "plans": LEAVES | {"layers"},
    "adapt": LEAVES | {"attention", "cache", "layers"},
    "replay": LEAVES | {"adapt", "attention", "cache", "kernels", "layers"},
    "experts": LEAVES | {"adapt", "layers", "replay"},
    "worker": LEAVES
    | {"adapt", "attention", "cache", "experts", "kernels", "layers", "loading", "models", "plans", "replay"},
    "parallel": LEAVES | {"cache", "layers", "models", "plans", "worker"},
    "pooling": LEAVES | {"layers", "loading", "models", "worker"},
    "engine": LEAVES | {"worker", "parallel", "pooling", "cache", "models"},
    "llm": LEAVES | {"engine", "models"},
    "async_llm": LEAVES | {"engine", "models"},
    "bench": LEAVES | {"llm", "engine", "kernels"},
    "server": LEAVES | {"async_llm", "engine", "models"},
    "cli": LEAVES | {"bench", "engine", "llm", "server", "models", "plans", "pooling", "worker"},
    "__init__": LEAVES | {"llm", "async_llm"},
    "__main__": {"cli"},
}
"""Per room, the rooms and leaves its run-time imports may name. What stands under TYPE_CHECKING is free."""


def room_of(module: str) -> str:
    """Room or leaf of a dotted module name inside the package: `engine.messages`, `engine`, `config`."""
    return module if module in LEAVES else module.split(".")[0]


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package as (dotted name inside it, file)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts), path


def imports_of(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports when it runs, at any depth of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module in {"shardwright", "shardwright.engine"}:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("shardwright.") for name in names if name.startswith("shardwright."))


def test_every_room_is_in_the_table() -> None:
    assert {room_of(name) for name, _ in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_follow_the_table(name: str, path: Path) -> None:
    room = room_of(name)
    upward = {target for target in imports_of(path) if room_of(target) not in MAY_IMPORT[room] | {room}}
    assert not upward, f"{name} imports {', '.join(sorted(upward))}, which {room} may not"


def test_the_table_has_no_cycle() -> None:
    def visit(room: str, above: tuple[str, ...]) -> None:
        assert room not in above, " -> ".join((*above, room))
        for below in MAY_IMPORT[room]:
            visit(below, (*above, room))

    for room in MAY_IMPORT:
        visit(room, ())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("shardwright", {"torch", "transformers", "zmq", "fastapi"}),
        ("shardwright.cli.main", {"torch", "transformers", "fastapi"}),
        ("shardwright.engine.scheduler", {"torch", "transformers"}),
        ("shardwright.cache.block_pool", {"torch", "transformers"}),
        ("shardwright.cache.manager", {"torch", "transformers"}),
        ("shardwright.models.resolve", {"torch", "transformers", "huggingface_hub"}),
    ],
)
def test_importing_is_light(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert not absent & loaded
