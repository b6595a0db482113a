"""What this machine can do at best: how fast it reads memory and multiplies matrices.

The best of several tries counts, since other work on the machine only ever slows one down. On a CPU memory is read in
huge pages, and matrices are multiplied by torch and by shardwright's own kernel: whichever is faster is the rate.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from shardwright.kernels.huge_pages import empty_in_huge_pages
from shardwright.kernels.packed_linear import is_available, pack_weight, packed_elements, packed_linear

READ_BYTES = 1 << 29
"""Far more than any cache holds."""
GEMM_SHAPE = (512, 2048, 2048)
GEMM_DTYPES = (torch.float32, torch.bfloat16)
SECONDS_PER_MEASUREMENT = 0.5
FEWEST_TRIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine and its measured rates, all threads together."""

    cpu: str
    cores: int
    """That this process may use."""
    threads: int
    """That torch computes with."""
    read_gb_per_s: float
    gemm_gflop_per_s: float
    gemm_dtype: str
    """The faster one; "packed" stands for shardwright's own kernel, bfloat16 weights and sums in float32."""
    gpu: str | None = None

    def at_best(self, other: Machine) -> Machine:
        """The better rates of two measurements of one machine."""
        faster = max(self, other, key=lambda machine: machine.gemm_gflop_per_s)
        return replace(faster, read_gb_per_s=max(self.read_gb_per_s, other.read_gb_per_s))

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def measure_machine(device: str = "cpu") -> Machine:
    """Measure the machine that a model on `device` runs on. Takes a few seconds."""
    rates = {str(dtype).removeprefix("torch."): gemm_gflop_per_s(device, dtype) for dtype in GEMM_DTYPES}
    if device == "cpu" and is_available():
        rates["packed"] = packed_gflop_per_s()
    gemm_dtype = max(rates, key=lambda name: rates[name])
    return Machine(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        read_gb_per_s=round(read_gb_per_s(device), 2),
        gemm_gflop_per_s=round(rates[gemm_dtype], 1),
        gemm_dtype=gemm_dtype,
        gpu=torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    )


def read_gb_per_s(device: str) -> float:
    """Bytes read per second when a large tensor is summed up."""
    if device == "cpu":
        size = min(READ_BYTES, psutil.virtual_memory().available // 4)
        numbers = empty_in_huge_pages(size // 4 * 4).view(torch.float32).fill_(1.0)
    else:
        numbers = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)
    seconds = best_seconds(numbers.sum, device)
    return numbers.nbytes / seconds / 1e9


def gemm_gflop_per_s(device: str, dtype: torch.dtype) -> float:
    """Rate of `x @ w.T` in the shape of a linear layer over a packed batch."""
    x, w = _factors(device, dtype)
    with torch.inference_mode():
        return _gflop_per_s(lambda: torch.nn.functional.linear(x, w), device)


def packed_gflop_per_s() -> float:
    """The same by shardwright's own kernel."""
    x, w = _factors("cpu", torch.bfloat16)
    packed = pack_weight(w, torch.empty(packed_elements(*w.shape), dtype=w.dtype))  # in 12 bits it would be unpacked
    return _gflop_per_s(lambda: packed_linear(x, packed, None, len(w)), "cpu")


def _factors(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, depth, columns = GEMM_SHAPE
    return torch.ones(rows, depth, dtype=dtype, device=device), torch.ones(columns, depth, dtype=dtype, device=device)


def _gflop_per_s(product: Callable[[], Tensor], device: str) -> float:
    return 2 * math.prod(GEMM_SHAPE) / best_seconds(product, device) / 1e9


def best_seconds(work: Callable[[], Tensor], device: str) -> float:
    """The shortest of the times that a piece of work took, over about half a second of tries."""
    best = float("inf")
    tries, end = 0, time.perf_counter() + SECONDS_PER_MEASUREMENT
    while tries < FEWEST_TRIES or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        tries += 1
    return best


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()
