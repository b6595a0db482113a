"""What the commands of `bench` share: the machine measured, and how it and latencies are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.cli.output import stdout, working

if TYPE_CHECKING:
    from shardwright.bench.machine import Machine

MANY_S = 10


def measure_device(device: str) -> Machine:
    """The rates of the machine, on the device that an engine would take."""
    import torch

    from shardwright.bench.machine import measure_machine

    with working("measuring the machine"):
        return measure_machine(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def print_machine(machine: dict[str, Any]) -> None:
    """One line that says what machine it is and what it can do."""
    stdout().print(
        f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads: reads"
        f" {machine['read_gb_per_s']:.1f} GB/s, multiplies {machine['gemm_gflop_per_s']:.0f} GFLOP/s"
        f" ({machine['gemm_dtype']})",
        markup=False,
        soft_wrap=True,
    )


def latencies(seconds: dict[str, float] | None) -> str:
    """Percentiles for the table: milliseconds, or seconds where those are many."""
    if seconds is None:
        return "-"
    return "/".join(f"{value * 1000:.0f}" if value < MANY_S else f"{value:.0f}s" for value in seconds.values())
