"""What one of several replicas on a machine gets of it: cores, GPUs, and a seed of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from shardwright.config import EngineConfig
from shardwright.errors import ConfigError


def config_of_replica(config: EngineConfig, index: int) -> EngineConfig:
    """The configuration of a replica: sequences without a seed of their own are sampled differently on each."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, seed=config.model.seed + index))


def environment_of_replica(config: EngineConfig, index: int) -> dict[str, str]:
    """Environment variables of a replica's processes, beside those of this one.

    Raises: ConfigError if there are fewer GPUs than replicas need.
    """
    parallel = config.parallel
    if parallel.data_parallel_size == 1:
        return {}
    on_ray = parallel.distributed_executor_backend == "ray"
    environment = {}
    is_rank = parallel.num_ranks == 1 and not on_ray  # ranks in processes of their own see to their cores themselves
    if is_rank and "OMP_NUM_THREADS" not in os.environ:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment["OMP_NUM_THREADS"] = str(max(1, num_cores // parallel.data_parallel_size))
    if config.model.device != "cpu" and not on_ray:
        environment |= _gpus(config, index)
    return environment


def _gpus(config: EngineConfig, index: int) -> dict[str, str]:
    import torch

    num_gpus, num_ranks = torch.cuda.device_count(), config.parallel.num_ranks
    if num_gpus == 0:
        return {}
    needed = num_ranks * config.parallel.data_parallel_size
    if num_gpus < needed:
        raise ConfigError(
            f"{config.parallel.data_parallel_size} replicas of {num_ranks} ranks need {needed} GPUs but there are "
            f"{num_gpus}: lower data_parallel_size, or use --device cpu"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if len(visible) >= num_gpus and visible[0] else [str(gpu) for gpu in range(num_gpus)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[index * num_ranks : (index + 1) * num_ranks])}


@contextlib.contextmanager
def changed_environment(changes: dict[str, str]) -> Iterator[None]:
    """While open, processes that are started have these environment variables."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
