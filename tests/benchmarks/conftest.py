"""Benchmarks are scripts beside each other: their tests import them as they import one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.bench import machine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "GEMM_SHAPE", (64, 64, 64))
    monkeypatch.setattr(machine, "SECONDS_PER_MEASUREMENT", 0.0)
