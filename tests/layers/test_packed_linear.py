"""Linears with packed weights: same parameters, results of float32 products rounded once."""

from __future__ import annotations

import logging
import subprocess
import sys
from threading import Event

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardwright.layers import packed_linear
from shardwright.layers.cpu_linears import keep_unpacked, replace_linears
from shardwright.layers.packed_linear import PackedLinear, pack_linears
from shardwright.layers.upcast_linear import UpcastLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_module(dtype: torch.dtype) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(9, 40), nn.ReLU(), nn.Linear(40, 7, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9,), (1, 9), (2, 3, 9), (0, 9)])
def test_results_are_those_of_float32_rounded(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module = make_module(dtype)
    x = torch.linspace(-2, 2, 54)[: torch.Size(shape).numel()].view(shape).to(dtype)
    wide = F.linear(x.float(), module[0].weight.float(), module[0].bias.float()).to(dtype)
    expected = F.linear(wide.relu().float(), module[2].weight.float()).to(dtype)
    assert pack_linears(module) == 2
    with torch.inference_mode():
        actual = module(x)
    assert actual.dtype is dtype
    torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_parameters_and_names_stay() -> None:
    module = make_module(torch.bfloat16)
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    pack_linears(module)
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == before
    assert all(type(linear) is PackedLinear for linear in (module[0], module[2]))


def test_a_weight_that_is_changed_in_place_is_packed_again() -> None:
    module = make_module(torch.float32)
    pack_linears(module)
    with torch.inference_mode():
        before = module(torch.ones(9))
        module[2].weight.mul_(2)
        torch.testing.assert_close(module(torch.ones(9)), 2 * before)


def test_subclasses_and_whole_numbers_are_left_alone() -> None:
    class Own(nn.Linear):
        """Does something else in its forward, for all we know."""

    numbers = nn.Linear(4, 4)
    numbers.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    module = nn.Sequential(Own(4, 4), numbers)
    assert pack_linears(module) == 0
    assert [type(linear) for linear in module] == [Own, nn.Linear]


def test_many_tokens_are_left_to_torch_where_it_is_told_so() -> None:
    module = make_module(torch.float32)
    pack_linears(module)
    for linear in (module[0], module[2]):
        linear.most_tokens = 4
        linear.packed.zero_()
    with torch.inference_mode():
        assert module(torch.ones(4, 9)).count_nonzero() == 0
        assert module(torch.ones(5, 9)).count_nonzero() > 0


@pytest.mark.parametrize(("share", "keeps"), [(0.125, True), (1e-9, False)])
def test_weights_are_kept_unpacked_where_memory_is_plentiful(
    share: float, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "UNPACKED_SHARE", share)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 30)).bfloat16()
    x = torch.linspace(-2, 2, 5 * 256).view(5, 256).bfloat16()
    replace_linears(module)
    first = module[0]
    assert isinstance(first, PackedLinear)
    assert (first.packed.dtype, first.unpacked is not None) == (torch.uint8, keeps)
    with torch.inference_mode():
        expected = module(x)
        assert first.unpacked is None or not first.unpacked.any(), "nobody said that it shall be"
        keep_unpacked(module).join()
        assert torch.equal(module(x), expected)
    assert first.unpacked is None or first.unpacked.any()


def test_weights_that_nobody_holds_any_more_are_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).bfloat16()
    replace_linears(module)
    begun, unpacked, keep = Event(), [], PackedLinear.keep_unpacked

    def slow(linear: PackedLinear) -> None:
        unpacked.append(linear.in_features)
        begun.wait()
        keep(linear)

    monkeypatch.setattr(PackedLinear, "keep_unpacked", slow)
    thread = keep_unpacked(module)
    del module
    begun.set()
    thread.join()
    assert len(unpacked) <= 1


ENDS_BEFORE_ALL_ARE_UNPACKED = """
import atexit, time
from torch import nn
from shardwright.layers.cpu_linears import keep_unpacked, replace_linears
from shardwright.layers.packed_linear import PackedLinear

unpacked = []
PackedLinear.keep_unpacked = lambda linear: time.sleep(0.02) or unpacked.append(linear)
module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(500))).bfloat16()
replace_linears(module)
keep_unpacked(module)
atexit.register(lambda: print(len(unpacked)))
while not unpacked:
    time.sleep(0.001)
"""


def test_a_process_that_ends_does_not_wait_for_all_weights() -> None:
    child = subprocess.run([sys.executable, "-c", ENDS_BEFORE_ALL_ARE_UNPACKED], capture_output=True, text=True)
    assert 1 <= int(child.stdout) < 100, child.stderr


ENDS_WHILE_A_WEIGHT_IS_GIVEN_BACK = """
import threading, time, torch
from torch import nn
from shardwright.layers.cpu_linears import keep_unpacked, replace_linears

class Slow(bytearray):
    def __del__(self):
        given_back.set()
        for _ in range(300):  # one of them ends while Python does
            time.sleep(0.001)

given_back = threading.Event()
linear = nn.Linear(2048, 8192, bias=False).bfloat16()
weight = torch.frombuffer(Slow(linear.weight.nbytes), dtype=torch.bfloat16).view_as(linear.weight)
linear.weight = nn.Parameter(weight, requires_grad=False)
replace_linears(linear)
keep_unpacked(linear)
del linear, weight
assert not given_back.is_set(), "unpacking takes longer"
given_back.wait()
"""


def test_a_process_may_end_while_a_weight_that_was_unpacked_is_given_back() -> None:
    child = subprocess.run([sys.executable, "-c", ENDS_WHILE_A_WEIGHT_IS_GIVEN_BACK], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_a_weight_that_outgrows_12_bits_takes_16_and_may_come_back() -> None:
    module = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    replace_linears(module)
    keep_unpacked(module).join()
    linear, x = module[0], torch.ones(5, 64).bfloat16()
    assert isinstance(linear, PackedLinear)
    small = linear.weight.detach().clone()
    for weight, dtype in ((small, torch.uint8), (torch.ldexp(small, torch.arange(-40, 24)).bfloat16(), torch.bfloat16)):
        with torch.inference_mode():
            linear.weight.copy_(weight)
            for _ in range(4):
                assert torch.equal(module(x), (x.float() @ weight.float().T).bfloat16())
        assert linear.packed.dtype is dtype


def test_without_memory_linears_are_widened(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(packed_linear, "MEMORY_SHARE", 1e-9)
    assert psutil.virtual_memory().available * 1e-9 < 1000
    module = make_module(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        replace_linears(module)
    assert [record.message.split(",")[0] for record in caplog.records] == ["weights are not packed"]
    assert isinstance(module[0], UpcastLinear)


def test_without_a_compiler_linears_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwright.layers.cpu_linears.is_available", lambda: False)
    module = make_module(torch.bfloat16)
    replace_linears(module)
    assert isinstance(module[0], UpcastLinear)
