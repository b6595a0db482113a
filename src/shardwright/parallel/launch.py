"""Which executor an engine gets."""

from __future__ import annotations

from functools import partial

from shardwright.config import EngineConfig
from shardwright.parallel.ahead import AheadExecutor
from shardwright.parallel.executor import ParallelExecutor
from shardwright.parallel.inline import InlineExecutor

FEW_RANKS = 4
"""More are started only once it is known that the model can be cut for as many."""


def start_executor(config: EngineConfig) -> InlineExecutor | AheadExecutor | ParallelExecutor:
    """Start the ranks of an engine, where the configuration says; by default one in this process, many in others.

    Raises: a UsageError for models, weights and options that do not work; RanksLostError if a rank ends at start.
    """
    if config.parallel.num_ranks > FEW_RANKS:
        check_plan_resolves(config)
    backend = config.parallel.distributed_executor_backend
    if backend == "auto":
        backend = "inline" if config.parallel.num_ranks == 1 else "mp"
    if backend == "inline":
        executor = InlineExecutor(config)
        return AheadExecutor(executor) if _runs_ahead(config, executor) else executor
    if backend == "mp":
        from shardwright.parallel.mp import MpRanks

        return ParallelExecutor(config, partial(MpRanks, config))
    from shardwright.parallel.ray import RayRanks

    return ParallelExecutor(config, partial(RayRanks, config))


def _runs_ahead(config: EngineConfig, executor: InlineExecutor) -> bool:
    """Whether steps are planned ahead. On a CPU planning takes cores from the step that runs, for which it hardly pays
    that a request may wait a step longer (docs/architecture.md).
    """
    wanted = config.scheduler.async_scheduling
    by_default = executor.info.device.startswith("cuda") and config.speculative.method == "none"
    return by_default if wanted is None else wanted


def check_plan_resolves(config: EngineConfig) -> None:
    """Raise PlanError if the model cannot be cut for so many ranks; each of them would find out, minutes later."""
    from shardwright.plans.quantization import quantization_of
    from shardwright.worker.blueprint import Blueprint
    from shardwright.worker.cut import resolve_table

    blueprint = Blueprint.of(config.model)
    module = blueprint.build(blueprint.dtype)
    resolve_table(module, config, quantization_of(module, config.model.weight_format))
