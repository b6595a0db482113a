from __future__ import annotations

import pytest

from shardwright.bench import machine


def test_a_machine_is_measured_and_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "GEMM_SHAPE", (64, 64, 64))
    monkeypatch.setattr(machine, "SECONDS_PER_MEASUREMENT", 0.0)
    document = machine.measure_machine().as_json()
    assert document["read_gb_per_s"] > 0
    assert document["gemm_gflop_per_s"] > 0
    assert document["gemm_dtype"] in ("float32", "bfloat16")
    assert document["cpu"]
    assert "gpu" not in document
