"""The part of a model that one of several ranks holds: cut as the plan says before its weights are read."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from shardwright.config import EngineConfig
from shardwright.plans.choose import choose_plan
from shardwright.plans.dataflow import Dataflow, trace_dataflow
from shardwright.plans.pipeline import Pipeline, PipelineStage, plan_pipeline
from shardwright.plans.quantization import Quantization, quantization_of
from shardwright.plans.resolve import resolve
from shardwright.plans.shard import fitted_table, shard
from shardwright.plans.slices import ShardSlice
from shardwright.plans.stages import layer_stack
from shardwright.plans.table import ShardTable
from shardwright.plans.units import unit_groups
from shardwright.worker.blueprint import Blueprint
from shardwright.worker.part import ModelPart, count_parameters, quantize
from shardwright.worker.placement import Peers, Placement


def load_cut(
    blueprint: Blueprint, config: EngineConfig, placement: Placement, peers: Peers, device: torch.device
) -> ModelPart:
    """Load what a rank among others holds of a model. Arguments and errors as of `load_part`."""
    whole: list[_Whole] = []

    def cut(module: nn.Module) -> ShardSlice:
        num_parameters = count_parameters(module)
        quantization = quantization_of(module, config.model.weight_format)
        table, flow = resolve_table(module, config, quantization)
        fitted = fitted_table(module, table)
        pipeline = plan_pipeline(module, fitted.table, flow=flow) if placement.pp > 1 else None
        whole.append(_Whole(fitted.table, quantization, pipeline, num_parameters))
        shard(module, fitted.table, stage=placement.stage, collectives=peers.stage, fitted=fitted.fitted)
        return ShardSlice(fitted.table, placement.stage, placement.tp_rank)

    module = blueprint.load(dummy=config.model.load_format == "dummy", cut=cut)
    table, pipeline, num_parameters = whole[0].table, whole[0].pipeline, whole[0].num_parameters
    quantize(module, whole[0].quantization, device)
    agree = peers.agree
    if pipeline is not None:
        stage = PipelineStage(module, pipeline, table, placement.stage, source=peers.source, target=peers.target)
        if not placement.is_last_stage:
            give_empty_logits(module)

        def agree(value: bool) -> bool:
            stage.settle()
            return peers.agree(value)

    return ModelPart(module=module, architecture=type(module).__name__, num_parameters=num_parameters, agree=agree)


@dataclass(frozen=True, slots=True)
class _Whole:
    """What was found out about the whole model before it was cut."""

    table: ShardTable
    quantization: Quantization | None
    pipeline: Pipeline | None
    num_parameters: int


def give_empty_logits(module: nn.Module) -> None:
    """Let a stage that hands over return what those who call a model expect: logits, but of no tokens' numbers, and the
    caches that its layers fill.

    The logits have the shape [B, T, 0]. Caches are what a layer is given and the model takes, under one name.
    """
    forward = module.forward
    taken = inspect.signature(forward).parameters

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> ModelOutput:
        handed = forward(*args, **kwargs)
        tokens: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        num_tokens = 1 if handed.gives_last_alone else tokens.shape[-1]
        caches = {name: value for name, value in handed.given.items() if name in taken and is_cache(value)}
        return ModelOutput(logits=torch.empty(len(tokens), num_tokens, 0, device=tokens.device), **caches)

    module.forward = run


def is_cache(value: Any) -> bool:
    """Whether layers may write into a value what they keep from token to token."""
    return isinstance(value, Cache) or (isinstance(value, list) and any(isinstance(item, Tensor) for item in value))


def resolve_table(
    module: nn.Module, config: EngineConfig, quantization: Quantization | None
) -> tuple[ShardTable, Dataflow | None]:
    """Which rank holds what of a model that may be on "meta", and what its layers compute from, if it is a pipeline.

    Raises: PlanError.
    """
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
    flow = trace_dataflow(module, layer_stack(module, plan).layers) if pp > 1 else None
    groups = unit_groups(module, plan)
    table = resolve(
        module, plan, groups, tp=tp, pp=pp, pp_split=parallel.layers_per_stage, flow=flow, quantization=quantization
    )
    return table, flow
