"""The engine core that a model needs: what the model is for decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeAlias

from shardwright.config import EngineConfig
from shardwright.engine.core import EngineCore
from shardwright.engine.pooling_core import PoolingCore
from shardwright.errors import ConfigError
from shardwright.foreign_imports import leave_out_training, load_torch_ahead, postpone_compiler
from shardwright.foreign_models import remember_model_names
from shardwright.models.resolve import resolve_model, uses_factory

if TYPE_CHECKING:
    from shardwright.engine.remote_core import RemoteCore

Core: TypeAlias = EngineCore | PoolingCore


def open_core(config: EngineConfig) -> Core | RemoteCore:
    """What a program steps by itself: a core in this process, or several in others. Raises as `start_core`."""
    if config.parallel.data_parallel_size == 1:
        return start_core(config)
    from shardwright.engine.remote_core import RemoteCore

    return RemoteCore(config)


def own_process(config: EngineConfig) -> None:
    """Say, ahead of the core, that this process is there for it alone: it starts sooner with what it then spares."""
    remember_model_names()
    models = [config.model] if config.speculative.method != "draft" else [config.model, config.of_draft.model]
    if config.parallel.num_ranks == 1 and not any(uses_factory(m) or m.trust_remote_code for m in models):
        load_torch_ahead()
        leave_out_training()


@contextmanager
def early_start(config: EngineConfig) -> Iterator[None]:
    """Begin what takes its time and needs no model yet, for a core that is started in this process while this is open.

    Raises: ModelSourceError if the model's directory cannot be had.
    """
    with ExitStack() as stack:
        is_own_code = uses_factory(config.model)
        if not is_own_code:
            postpone_compiler()
        from shardwright.worker.ahead import early_kernels, early_memory

        early_kernels(config)
        if not is_own_code:
            stack.enter_context(early_memory(config, resolve_model(config.model.model, revision=config.model.revision)))
        yield


def start_core(config: EngineConfig) -> Core:
    """One core, in this process. Raises a UsageError for models and options that do not work."""
    postpone_compiler()
    if uses_factory(config.model):
        if config.model.task not in ("auto", "generate"):
            raise ConfigError(
                f"{config.model.model} is code of its own, which is served to generate alone: leave out --task"
            )
        return EngineCore.from_config(config)
    from shardwright.models.build import load_config
    from shardwright.models.task import resolve_task

    path = resolve_model(config.model.model, revision=config.model.revision)
    model_config = load_config(path, trust_remote_code=config.model.trust_remote_code)
    task = resolve_task(config.model.task, model_config, path)
    if task == "generate":
        return EngineCore.from_config(config)
    if config.parallel.num_ranks > 1:
        raise ConfigError(
            f"{config.model.model} is served to {task}, which one rank does: leave out --tensor-parallel-size and "
            "--pipeline-parallel-size; --data-parallel-size runs several whole copies"
        )
    from shardwright.pooling.worker import PoolingWorker

    return PoolingCore(PoolingWorker(config, path, model_config, classifies=task == "classify"))
