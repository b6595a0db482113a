"""What plan files may hold, and what is said of those that hold something else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import PlanError
from shardwright.plans.document import parse_text
from shardwright.plans.plan import ParallelPlan, parse_plan, read_plan
from shardwright.plans.styles import ALIASES, STYLES

GOOD = {
    "tp_plan": {"layers.*.q": "colwise", "layers.*.o": "rowwise"},
    "pp_plan": {"embed": [["ids"], ["x"]], "layers": [["x", "mask"], ["x"]]},
    "no_split": ["Layer"],
}


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plan.{suffix}"
    path.write_text(json.dumps(GOOD) if suffix == "json" else yaml.safe_dump(GOOD, sort_keys=False))
    plan = read_plan(path)
    assert plan.as_document() == GOOD
    assert (plan.tp_source, plan.pp_source) == ("file", "file")


def test_either_part_may_stand_alone_without_its_name() -> None:
    assert parse_plan(GOOD["tp_plan"], where="x", source="file").tp == GOOD["tp_plan"]
    assert list(parse_plan(GOOD["pp_plan"], where="x", source="file").pp) == ["embed", "layers"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a plan is a mapping of patterns to styles, not NoneType"),
        ("{}", "is empty: it needs a tp_plan"),
        ("[1, 2]", "not list"),
        ("just words", "not str"),
        ("tp_plan: [a, b]", "tp_plan must be a mapping, not list"),
        ("tp_plan: {a: 3}", "'a' must name a style such as 'colwise', not int"),
        ("tp_plan: {3: colwise}", "3 is no pattern"),
        ("tp_plan: {a..b: colwise}", "'a..b' is no pattern"),
        ("tp_plan: {a: colwize}", "unknown style 'colwize'; did you mean 'colwise'?"),
        ("tp_plan: {a: colwise}\npp_plann: {}", "unknown key 'pp_plann'; known are tp_plan, pp_plan"),
        ("a: colwise\nb: [x]", "'b' must name a style"),
        ("pp_plan: {a: colwise}", "pipeline entry 'a' must have two lists of names"),
        ("pp_plan: {a: [[x], [y], [z]]}", "pipeline entry 'a' must have two lists of names"),
        ("pp_plan: {a: [[1], [y]]}", "pipeline entry 'a' must have two lists of names"),
        ("pp_plan: {1: [[x], [y]]}", "pipeline entry 1 must have two lists of names"),
        ("tp_plan: {a: colwise}\nno_split: Layer", "no_split must be a list of class names, not str"),
        ("tp_plan: {a: colwise, b: rowwise, a: rowwise}", "the key 'a' stands there twice, again in line 1"),
        ("tp_plan: &t {a: *t}", "line 1 refers to *t"),
        ("tp_plan: &t {a: colwise}\npp_plan: *t", "line 2 refers to *t: write out what it stands for"),
        ("tp_plan: {a: !!bool perhaps}", "is no YAML"),
        ("tp_plan: {a: !!python/object:os.system x}", "is no YAML"),
        ("tp_plan: {a: colwise", "is no YAML"),
        ("a: " + "[" * 5000, "is no YAML"),
    ],
)
def test_a_wrong_file_gets_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(PlanError) as error:
        read_plan(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"tp_plan": {"a": "colwise", "a": "rowwise"}}', "the key 'a' stands there twice"),
        ('{"tp_plan": {"a": "colwise",}}', "is no JSON"),
        ("[" * 200_000, "is no JSON"),
        ("", "is no JSON"),
    ],
)
def test_a_wrong_json_file_gets_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=says):
        read_plan(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "weights.yaml"
    binary.write_bytes(bytes(range(256)))
    for path in (tmp_path / "none.json", tmp_path, binary):
        with pytest.raises(PlanError, match="cannot be read"):
            read_plan(path)


def test_a_file_of_weights_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PlanError, match="is it a plan"):
        read_plan(path)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
WORDS = st.sampled_from([*STYLES, *ALIASES]) | st.text(max_size=6)
NAMES = st.sampled_from(["a.*.b", "model.layers", "*", "a", ".", "", 3, None])
PLANS = st.dictionaries(NAMES, WORDS | SCALARS | st.lists(st.lists(st.text(max_size=3)) | SCALARS, max_size=3))
DOCUMENTS = st.recursive(
    SCALARS | PLANS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["tp_plan", "pp_plan", "no_split", "base_model_tp_plan", "x", 1]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=400)
@given(DOCUMENTS)
def test_any_document_is_a_plan_or_a_plan_error(document: Any) -> None:
    with contextlib.suppress(PlanError):
        plan = parse_plan(document, where="a document", source="file")
        assert isinstance(plan, ParallelPlan)
        again = parse_plan(plan.as_document(), where="a document", source="file")
        assert (again.tp, again.pp, again.no_split) == (plan.tp, plan.pp, plan.no_split)


@settings(max_examples=300)
@given(st.text(alphabet="ab:*&![]{},'\"\n -|>?%@#1.~<=", max_size=60), st.booleans())
def test_any_text_is_data_or_a_plan_error(text: str, is_json: bool) -> None:
    with contextlib.suppress(PlanError):
        parse_plan(parse_text(text, is_json=is_json, where="a text"), where="a text", source="file")
