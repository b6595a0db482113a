"""Pipeline stages of several tensor-parallel ranks each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.plans.staged import MemoryLink, logits, whole
from tests.zoo.builder import draw, make_config
from torch import Tensor

from shardwright.plans.dataflow import without_cache
from shardwright.plans.pipeline import PipelineStage, plan_pipeline
from shardwright.plans.plan import plan_of
from shardwright.plans.resolve import resolve
from shardwright.plans.shard import shard
from shardwright.plans.threads import ThreadCollectives, run_ranks
from shardwright.plans.units import unit_groups

TOKENS = torch.tensor([[5, 9, 77, 3, 12, 41, 8, 8, 100, 2]])
TP, PP = 2, 2


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("gemma2", {"query_pre_attn_scalar": 16})],
)
def test_two_stages_of_two_ranks(model_type: str, fields: dict[str, Any]) -> None:
    module = draw(make_config(model_type, fields), seed=0)
    plan = plan_of(module)
    table = resolve(module, plan, unit_groups(module, plan), tp=TP, pp=PP)
    pipeline = plan_pipeline(module, table)
    links = [MemoryLink() for _ in range(TP)]
    output: Any = None
    for stage in range(PP):

        def work(group: ThreadCollectives, stage: int = stage) -> Any:
            part, link = copy.deepcopy(module), links[group.rank]
            shard(part, table, stage=stage, collectives=group)
            PipelineStage(part, pipeline, table, stage, source=link if stage else None, target=None if stage else link)
            with torch.inference_mode():
                return part(TOKENS, **without_cache(part))

        output = run_ranks(TP, work)[0]
    result: Tensor = logits(output)
    torch.testing.assert_close(result, whole(module, TOKENS), rtol=0, atol=1e-5)
