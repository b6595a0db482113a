"""What a replica gets of its machine."""

from __future__ import annotations

import os

import pytest
import torch

from shardwright.config import EngineConfig
from shardwright.engine.share import changed_environment, config_of_replica, environment_of_replica
from shardwright.errors import ConfigError


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores, no GPU, nothing set by the user."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def config(**options: object) -> EngineConfig:
    return EngineConfig.from_options("model", **options)


def test_an_engine_without_replicas_has_the_machine_to_itself() -> None:
    assert environment_of_replica(config(), 0) == {}


@pytest.mark.parametrize(("replicas", "threads"), [(2, "4"), (3, "2"), (20, "1")])
def test_cores_are_divided(replicas: int, threads: str) -> None:
    assert environment_of_replica(config(data_parallel_size=replicas), 1) == {"OMP_NUM_THREADS": threads}


def test_the_users_number_of_threads_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment_of_replica(config(data_parallel_size=2), 0) == {}


def test_ranks_divide_cores_among_themselves() -> None:
    assert environment_of_replica(config(data_parallel_size=2, tensor_parallel_size=2), 0) == {}


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0,1", "2,3"]), ("4,5,6,7", ["4,5", "6,7"])])
def test_gpus_are_divided(monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    options = config(data_parallel_size=2, tensor_parallel_size=2)
    assert [environment_of_replica(options, index)["CUDA_VISIBLE_DEVICES"] for index in range(2)] == expected


def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match="2 replicas of 2 ranks need 4 GPUs but there are 3"):
        environment_of_replica(config(data_parallel_size=2, tensor_parallel_size=2), 0)
    assert "CUDA_VISIBLE_DEVICES" not in environment_of_replica(config(data_parallel_size=4, device="cpu"), 3)


def test_replicas_sample_differently_unless_a_request_has_a_seed() -> None:
    options = config(seed=7, data_parallel_size=2)
    assert [config_of_replica(options, index).model.seed for index in range(2)] == [7, 8]


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VARIABLE", "before")
    monkeypatch.delenv("ANOTHER_VARIABLE", raising=False)
    with changed_environment({"SOME_VARIABLE": "inside", "ANOTHER_VARIABLE": "inside"}):
        assert os.environ["SOME_VARIABLE"] == os.environ["ANOTHER_VARIABLE"] == "inside"
    assert os.environ["SOME_VARIABLE"] == "before"
    assert "ANOTHER_VARIABLE" not in os.environ
