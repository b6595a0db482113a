"""What dataflow shows, against the plans that Transformers ships."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.zoo.architectures import FULL, MIXED, SLIDING
from tests.zoo.builder import make_config
from torch import nn

from shardwright.models.build import build_module
from shardwright.plans.deal import is_exchanged
from shardwright.plans.groups import UnitGroup
from shardwright.plans.infer import infer_plan
from shardwright.plans.patterns import matches
from shardwright.plans.plan import ParallelPlan, plan_of
from shardwright.plans.resolve import cut_dimension, matching_pattern, parameters_of
from shardwright.plans.styles import REPLICATE
from shardwright.plans.units import unit_groups

BETTER = {
    ("colwise_gather_output", "packed_colwise"): "gate and up lie in one weight: each of them can be cut",
    ("rowwise_split_input", "rowwise"): "what comes after them",
    ("rowwise_split_input", "colwise_gather_output"): "parts are put together for less than sums are added up",
    ("mla_kv_a_proj", "colwise_gather_output"): "in these tiny models the low rank is as large as the hidden size",
}
"""Differences between a shipped and an inferred plan: words of both, and why."""

ARCHITECTURES = FULL | SLIDING | MIXED

PER_HEAD_MASK = "adds to all heads what one linear computes from all values: no rank has all of these"
WHOLE_WIDTH = "looks at the mean and deviation of all features, of which a rank has a part"

NOT_IN_A_GROUP = {
    "doge": {"self_attn.*": PER_HEAD_MASK},
    "gemma3n_text": {"mlp.*": WHOLE_WIDTH},
}
"""Entries that cut inside of what dataflow binds together."""


@cache
def model(name: str) -> nn.Module:
    module = build_module(make_config(name, ARCHITECTURES[name]), torch.float32, trust_remote_code=False)
    module.tie_weights(recompute_mapping=False)
    return module


@cache
def inferred(name: str) -> ParallelPlan:
    return infer_plan(model(name))


@cache
def groups(name: str) -> list[UnitGroup]:
    return unit_groups(model(name), plan_of(model(name)))


def uncovered(name: str) -> set[str]:
    """Patterns of a shipped plan that cut a dimension of no group, and leave their part on its rank."""
    module, found = model(name), set()
    plan = plan_of(module)
    covered = {(member.name, member.dim) for group in groups(name) for member in group.members}
    for first, aliases, parameter, owner in parameters_of(module):
        pattern = next((p for n in (first, *aliases) if (p := matching_pattern(plan, n)) is not None), None)
        if pattern is None or is_exchanged(plan.styles[pattern]):
            continue
        dim = cut_dimension(owner, first.rpartition(".")[2], parameter.ndim, plan.styles[pattern])
        if dim is not None and not any((n, dim) in covered for n in (first, *aliases)):
            found.add(pattern)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_cover_what_a_shipped_plan_cuts(name: str) -> None:
    expected = NOT_IN_A_GROUP.get(name, {})
    assert {p for p in uncovered(name) if not any(matches(f"model.layers.*.{e}", p) for e in expected)} == set()
    assert bool(uncovered(name)) == bool(expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_inferred_plan_cuts_what_a_shipped_one_does(name: str) -> None:
    own, made, module = plan_of(model(name)), inferred(name), model(name)
    names = [n for n, _ in module.named_modules()] + [n for n, _ in module.named_parameters()]
    present = [p for p in own.tp if any(matches(p, n) for n in names)]
    different = {
        (own.tp[pattern], made.tp.get(pattern, "replicate"))
        for pattern in present
        if own.styles[pattern] != made.styles.get(pattern, REPLICATE)
    }
    if name not in NOT_IN_A_GROUP:
        assert different <= BETTER.keys()
    if len(own.pp) > 1:
        idle = [n for n in own.pp if n.endswith("dropout")]
        assert [n for n in own.pp if n not in idle] == [n for n in made.pp if n in own.pp or n != "lm_head"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_large_linears_are_cut_by_an_inferred_plan(name: str) -> None:
    module, made = model(name), inferred(name)
    for first, aliases, parameter, owner in parameters_of(module):
        runs_in_a_layer = "layers." in first and "encoder_attn" not in first
        if runs_in_a_layer and isinstance(owner, nn.Linear) and parameter.ndim == 2 and min(parameter.shape) >= 64:
            assert any(matching_pattern(made, n) for n in (first, *aliases)), first
