"""Which back end computes attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwright.attention import choice
from shardwright.attention.batched import BatchedBackend
from shardwright.attention.choice import choose_backend, make_backend
from shardwright.attention.native import NativeBackend
from shardwright.attention.triton import TritonBackend
from shardwright.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (CPU, torch.float32, "native"),
        (CPU, torch.bfloat16, "native"),
        (CPU, torch.float16, "torch"),
        (CUDA, torch.float32, "triton"),
        (CUDA, torch.float16, "triton"),
        (CUDA, torch.float64, "torch"),
        (torch.device("mps"), torch.float32, "torch"),
    ],
)
def test_the_device_and_type_choose(device: torch.device, dtype: torch.dtype, expected: str) -> None:
    assert choose_backend("auto", device=device, dtype=dtype) == expected


def test_a_name_is_obeyed() -> None:
    for name in ("native", "triton", "torch"):
        assert choose_backend(name, device=CPU, dtype=torch.float32) == name


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "message"),
    [
        ("native", CUDA, torch.float32, "attention_backend is native but native kernels are for CPUs"),
        ("native", CPU, torch.float16, "no native kernel for float16"),
        ("triton", torch.device("mps"), torch.float32, "Triton does not compile for mps"),
        ("triton", CUDA, torch.float64, "no Triton kernels for float64"),
    ],
)
def test_one_that_cannot_run_is_refused(wanted: str, device: torch.device, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_backend(wanted, device=device, dtype=dtype)


def test_a_cpu_without_the_interpreter_has_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="Triton does not compile for cpu"):
        choose_backend("triton", device=CPU, dtype=torch.float32)
    assert choose_backend("triton", device=CUDA, dtype=torch.float32) == "triton"


def test_without_a_compiler_torch_does_it_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    choice._warn_once.cache_clear()
    for _ in range(2):
        assert choose_backend("auto", device=CUDA, dtype=torch.float32) == "torch"
    assert [record.message for record in caplog.records] == [
        "attention is computed by torch's own operators, which is slower: Triton needs a C compiler for its launchers: "
        "install gcc, or set CC"
    ]


def test_names_make_back_ends() -> None:
    made = [make_backend(name, block_size=4, device=CPU, compute_dtype=torch.float32) for name in ("native", "triton")]
    assert [type(backend) for backend in made] == [NativeBackend, TritonBackend]
    torch_backend = make_backend("torch", block_size=4, device=CPU, compute_dtype=torch.float32)
    assert isinstance(torch_backend, BatchedBackend)
