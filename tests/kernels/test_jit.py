"""Libraries are compiled once, whoever asks, and side by side."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest

from shardwright.kernels import jit

TIMEOUT_S = 60


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A small kernel of two sources that was never compiled; the folder that its library will lie in."""
    sources = tmp_path / "native"
    sources.mkdir()
    shutil.copy(jit.SOURCES / "exported.h", sources)
    (sources / "own.cpp").write_text("int own() { return 42; }\n")
    (sources / "small.cpp").write_text('#include "exported.h"\nint own();\nEXPORTED int answer() { return own(); }\n')
    monkeypatch.setattr(jit, "SOURCES", sources)
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "cache"))
    jit._loaded.cache_clear()
    yield tmp_path / "cache" / "kernels"
    jit._loaded.cache_clear()


def test_threads_that_ask_at_once_have_it_compiled_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Sequence[str]] = []

    class Counted(subprocess.Popen[bytes]):
        def __init__(self, command: Sequence[str], **options: Any) -> None:
            if "-c" in command:
                compiled.append(command)
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Counted)
    barrier, answers = Barrier(4), []

    def ask() -> None:
        barrier.wait(TIMEOUT_S)
        library = jit.native_library()
        assert library is not None
        answers.append(library.answer())

    threads = [Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert answers == [42] * 4
    assert len(compiled) == 2, "each source once"


def test_what_is_compiled_ahead_is_there_when_it_is_asked_for(empty_cache: Path) -> None:
    jit.compile_ahead()
    library = jit.native_library()
    assert library is not None
    assert library.answer() == 42
    assert [path.suffix for path in empty_cache.iterdir()] == [".so"]


def test_what_was_written_for_a_model_may_include_what_kernels_do(empty_cache: Path) -> None:
    (jit.SOURCES / "numbers.h").write_text("constexpr int NUMBER = 7;\n")
    library = jit.generated_library(
        "written", '#include "exported.h"\n#include "numbers.h"\nEXPORTED int number() { return NUMBER; }\n'
    )
    assert library is not None
    assert library.number() == 7
    assert [path.name.split("-")[0] for path in empty_cache.glob("*.so")] == ["written"]


@pytest.mark.usefixtures("empty_cache")
def test_a_source_that_does_not_compile_ends_the_compiling_of_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Slow(subprocess.Popen[bytes]):
        def __init__(self, command: Sequence[str], **options: Any) -> None:
            super().__init__(["sleep", "600"] if str(command[-1]).endswith("small.o") else command, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    (jit.SOURCES / "own.cpp").write_text("int own() { return unknown; }\n")
    assert jit.native_library() is None
    assert "unknown" in caplog.records[0].message
    assert all(process.returncode is not None for process in started)


@pytest.mark.usefixtures("empty_cache")
def test_a_kernel_that_does_not_compile_is_named_with_the_error(caplog: pytest.LogCaptureFixture) -> None:
    (jit.SOURCES / "wrong.h").write_text("int f() { return unknown; }\n")
    assert jit.generated_library("wrong", '#include "wrong.h"\n') is None
    (record,) = caplog.records
    assert record.message.startswith("native wrong cannot be compiled, some steps are slower: ")
    assert "error:" in record.message
    assert "unknown" in record.message
