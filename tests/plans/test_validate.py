"""Plans of a module in hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.plans.semantic import PP, TP, semantic_model

from shardwright.errors import PlanError
from shardwright.plans import validate_plans

OUTPUT = "causal_lm.layer_stack.layers.*.attention.output_linear"


def test_a_good_plan_is_true() -> None:
    report = validate_plans(semantic_model(), strict=True)
    assert report
    assert report.ok


def test_a_wrong_plan_is_false_and_says_why() -> None:
    report = validate_plans(semantic_model(), tp_plan={**TP, OUTPUT: "colwise"})
    assert not report
    assert report.findings[0].where == OUTPUT
    assert f'fix: "{OUTPUT}": "rowwise"' in str(report)
    assert report.as_json()["findings"][0]["fix"] == f'"{OUTPUT}": "rowwise"'


def test_strict_raises_with_every_error() -> None:
    wrong = {name: entry for name, entry in PP.items() if name != "causal_lm.layer_stack.layers"}
    with pytest.raises(PlanError) as error:
        validate_plans(semantic_model(), {**TP, OUTPUT: "colwise"}, wrong, strict=True)
    assert OUTPUT in str(error.value)
    assert "causal_lm.layer_stack.layers, which holds the layers" in str(error.value)
    assert "\n" not in str(error.value)


def test_plans_may_be_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"tp_plan": TP | {OUTPUT: "rowwise_rep"}, "pp_plan": PP}))
    assert validate_plans(semantic_model(), path, path).findings[0].where == OUTPUT


def test_wrong_types_are_plan_errors() -> None:
    for tp_plan in ({"a": 3}, {"lm_head": "colwize"}, {3: "colwise"}):
        with pytest.raises(PlanError):
            validate_plans(semantic_model(), tp_plan=tp_plan)
    with pytest.raises(PlanError, match="two lists of names"):
        validate_plans(semantic_model(), pp_plan={"lm_head": "colwise"})


def test_a_model_with_weights_stays_as_it_is() -> None:
    model = semantic_model().to_empty(device="cpu")
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert validate_plans(model)
    assert before == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
