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
    assert document["gemm_dtype"] in ("float32", "bfloat16", "packed")
    assert document["cpu"]
    assert "gpu" not in document


def test_the_better_rates_of_two_measurements_count() -> None:
    def measured(read: float, gemm: float, dtype: str) -> machine.Machine:
        return machine.Machine(cpu="c", cores=2, threads=2, read_gb_per_s=read, gemm_gflop_per_s=gemm, gemm_dtype=dtype)

    best = measured(30.0, 100.0, "float32").at_best(measured(20.0, 180.0, "packed"))
    assert (best.read_gb_per_s, best.gemm_gflop_per_s, best.gemm_dtype) == (30.0, 180.0, "packed")
