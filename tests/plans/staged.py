"""Run a model as pipeline stages, one after another, in this process."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.plans.dataflow import without_cache
from shardwright.plans.links import StageLink
from shardwright.plans.nested import tensors_with_paths
from shardwright.plans.pipeline import Pipeline, PipelineStage, plan_pipeline
from shardwright.plans.plan import ParallelPlan, plan_of
from shardwright.plans.resolve import resolve
from shardwright.plans.table import ShardTable


class MemoryLink:
    """A link between stages that run one after another."""

    def __init__(self) -> None:
        self._messages: deque[list[Tensor]] = deque()

    def send(self, tensors: list[Tensor]) -> None:
        self._messages.append([tensor.clone() for tensor in tensors])

    def recv(self) -> list[Tensor]:
        return self._messages.popleft()


def table_of(
    module: nn.Module, pp: int, *, plan: ParallelPlan | None = None, split: Sequence[int] | None = None
) -> ShardTable:
    """The table of a model on pipeline stages alone."""
    return resolve(module, plan or plan_of(module), [], pp=pp, pp_split=split)


def make_stages(
    module: nn.Module, table: ShardTable, *, pipeline: Pipeline | None = None, links: Sequence[StageLink] | None = None
) -> list[tuple[nn.Module, PipelineStage]]:
    """Copies of a model, each one stage of it."""
    pipeline = pipeline or plan_pipeline(module, table)
    links = links or [MemoryLink() for _ in range(table.pp - 1)]
    stages = []
    for stage in range(table.pp):
        part = copy.deepcopy(module)
        source = links[stage - 1] if stage > 0 else None
        target = links[stage] if stage < table.pp - 1 else None
        stages.append((part, PipelineStage(part, pipeline, table, stage, source=source, target=target)))
    return stages


@torch.inference_mode()
def run_stages(stages: Sequence[tuple[nn.Module, PipelineStage]], input_ids: Tensor, **options: Any) -> Tensor:
    """One forward pass through all stages; the logits of the last."""
    output: Any = None
    for module, _ in stages:
        output = module(input_ids, **(without_cache(module) | options))
    return logits(output)


@torch.inference_mode()
def whole(module: nn.Module, input_ids: Tensor, **options: Any) -> Tensor:
    """The logits of the model itself."""
    return logits(module(input_ids, **(without_cache(module) | options)))


def logits(output: Any) -> Tensor:
    """The first tensor of what a model returns."""
    return next(tensor for _, tensor in tensors_with_paths(output))
