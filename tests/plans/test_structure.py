from __future__ import annotations

import io

import pytest
import torch
from tests.plans.semantic import semantic_model
from torch import nn

from shardwright.plans.plan import ParallelPlan, plan_of
from shardwright.plans.structure import joined_name, structure_tree
from shardwright.plans.tree_text import print_model_structure


def make_module() -> nn.Module:
    """Layers 0, 1 and 3 alike; layer 2 wider; two projections of one shape; a tied head."""
    with torch.device("meta"):
        module = nn.Module()
        module.embed = nn.Embedding(10, 4)
        sizes = (4, 4, 8, 4)
        module.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, n), "k": nn.Linear(4, n)}) for n in sizes)
        module.head = nn.Linear(4, 10, bias=False)
        module.head.weight = module.embed.weight
    return module


def test_layers_built_alike_become_one_node() -> None:
    tree = structure_tree(make_module())
    layers = next(child for child in tree.children if child.name == "layers")
    assert [(node.name, node.count) for node in layers.children] == [("0-1, 3", 3), ("2", 1)]
    assert [child.name for child in layers.children[0].children] == ["q", "k"]
    assert layers.children[0].children[0].members == ["layers.0.q", "layers.1.q", "layers.3.q"]


def test_tied_parameters_count_once() -> None:
    tree = structure_tree(make_module())
    assert tree.num_parameters == 40 + 3 * 2 * 20 + 2 * 40
    assert tree.num_bytes == 4 * tree.num_parameters


def test_json_stops_at_the_depth_asked_for() -> None:
    document = structure_tree(make_module()).as_json(depth=1, params=True)
    assert [child["name"] for child in document["children"]] == ["embed", "layers", "head"]
    assert "children" not in document["children"][1]
    assert document["children"][2]["weights"] == [{"name": "weight", "shape": [10, 4], "dtype": "float32"}]


def test_numbers_in_names_are_joined_as_ranges() -> None:
    assert joined_name(["0", "1", "2", "5"]) == "0-2, 5"
    assert joined_name(["block_7", "block_8"]) == "block_7-8"
    assert joined_name(["norm"]) == "norm"


def test_layers_planned_differently_stay_apart() -> None:
    plan = ParallelPlan(tp={"layers.*.q": "colwise", "layers.1.q": "rowwise"})
    layers = structure_tree(make_module(), plan).children[1]
    assert [node.name for node in layers.children] == ["0, 3", "1", "2"]
    assert [node.children[0].word for node in layers.children] == ["colwise", "rowwise", "colwise"]


def test_the_tree_says_what_covers_what_and_what_nothing_covers() -> None:
    model = semantic_model(container="dict")
    del (tp := dict(plan_of(model).tp))["causal_lm.layer_stack.layers.*.feedforward.up"]
    out = io.StringIO()
    print_model_structure(model, max_depth=None, tp_plan=tp, file=out)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("SemanticModel")
    [layer] = [line for line in lines if "PreLNLayer" in line]
    assert "layer_0-3 (4 alike)" in layer
    [up] = [line for line in lines if " up: Linear" in line]
    assert up.endswith("<- in no entry of the plan")
    [gate] = [line for line in lines if " gate: Linear" in line]
    assert gate.endswith("<- colwise")
    assert sum("weight [128, 64] float32" in line for line in lines) == 2


@pytest.mark.parametrize("container", ["list", "dict"])
def test_depth_ends_the_tree(container: str) -> None:
    out = io.StringIO()
    print_model_structure(semantic_model(container=container), max_depth=1, show_params=False, file=out)
    assert [line[3:].split(":")[0] for line in out.getvalue().splitlines()[1:]] == ["causal_lm", "lm_head"]


def test_a_module_without_plan_or_parameters_is_printed_too() -> None:
    out = io.StringIO()
    print_model_structure(nn.Sequential(nn.ReLU()), file=out)
    assert out.getvalue() == "Sequential\n└─ 0: ReLU\n"
