"""The part of a model that one rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from shardwright.config import EngineConfig
from shardwright.plans.choose import choose_plan
from shardwright.plans.resolve import resolve
from shardwright.plans.shard import fitted_table, shard
from shardwright.plans.table import ShardTable
from shardwright.plans.units import unit_groups
from shardwright.worker.blueprint import Blueprint
from shardwright.worker.placement import Peers, Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart:
    """What a rank loaded."""

    module: nn.Module
    architecture: str
    """Class of the whole model."""
    num_parameters: int
    """Of the whole model."""


def load_part(blueprint: Blueprint, config: EngineConfig, placement: Placement, peers: Peers | None) -> ModelPart:
    """Load what a rank holds of a model.

    Args:
        blueprint: of the model.
        config: of the engine.
        placement: of the rank.
        peers: the ranks that hold the rest; None: there are none.

    Raises: CheckpointError, UnsupportedModelError; PlanError if the model cannot be cut so.
    """
    module = blueprint.load(dummy=config.model.load_format == "dummy")
    architecture, num_parameters = type(module).__name__, sum(p.numel() for p in module.parameters())
    if peers is not None:
        fitted = fitted_table(module, resolve_table(module, config))
        shard(module, fitted.table, stage=placement.stage, collectives=peers.stage, fitted=fitted.fitted)
    return ModelPart(module=module, architecture=architecture, num_parameters=num_parameters)


def resolve_table(module: nn.Module, config: EngineConfig) -> ShardTable:
    """Which rank holds what of a model that may be on "meta". Raises PlanError."""
    parallel = config.parallel
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    plan = choose_plan(
        module,
        tp_file=parallel.tp_plan,
        pp_file=parallel.pp_plan,
        tp=tp,
        pp=pp,
        expert_parallel=parallel.enable_expert_parallel,
    )
    return resolve(module, plan, unit_groups(module, plan), tp=tp, pp=pp, pp_split=parallel.layers_per_stage)
