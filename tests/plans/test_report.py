"""The report on a plan: as plain data, as a page, as a file that others read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from tests.plans.semantic import semantic_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from shardwright.errors import PlanError
from shardwright.plans.choose import choose_plan
from shardwright.plans.plan import ParallelPlan, plan_of, read_plan
from shardwright.plans.report import PlanReport, make_report
from shardwright.plans.report.page import page
from shardwright.plans.report.write import write_plan


@pytest.fixture(scope="module")
def report() -> PlanReport:
    model = semantic_model()
    return make_report(model, plan_of(model), model="semantic", tp=2, pp=2)


def test_the_document_has_every_parameter_stage_and_rank(report: PlanReport) -> None:
    model, document = semantic_model(), report.as_json()
    assert document["ok"]
    assert {row["name"] for row in document["parameters"]} == {name for name, _ in model.named_parameters()}
    query = next(row for row in document["parameters"] if row["name"].endswith("0.attention.query_linear.weight"))
    assert (query["dim"], query["pieces"], query["style"]) == (0, [32, 32], "colwise")
    assert [stage["rank"] for stage in document["pp"]["stages"]] == [0, 1]
    assert sum(stage["parameters"] for stage in document["pp"]["stages"]) == sum(p.numel() for p in model.parameters())
    assert [rank["rank"] for rank in document["memory"]] == [0, 1, 2, 3]
    assert json.loads(json.dumps(document)) == document


def test_memory_is_that_of_what_a_rank_holds(report: PlanReport) -> None:
    whole = sum(p.nbytes for p in semantic_model().parameters())
    cut = sum(rank["weight_bytes"] for rank in report.memory())
    replicated = sum(row.local_bytes(0) for row in report.rows if row.dim is None)
    assert cut == whole + replicated


def test_a_plan_that_cannot_be_carried_out_is_reported(report: PlanReport) -> None:
    model = semantic_model()
    failed = make_report(model, plan_of(model), model="semantic", tp=5, pp=1)
    assert (failed.ok, failed.table, failed.as_json()["parameters"]) == (False, None, [])
    assert "cannot be dealt to 5 ranks" in page(failed)


class Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps what they refer to."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(report: PlanReport) -> None:
    tags = Tags()
    tags.feed(page(report))
    assert (tags.open, tags.links) == ([], [])
    assert "query_linear" in tags.text
    assert "Memory per rank" in tags.text
    assert not re.search(r"url\(|@import|<script", page(report))
    assert page(report).count("<rect") >= 2 * len(report.plan.tp)


def test_names_on_the_page_are_text() -> None:
    model = semantic_model()
    plan = ParallelPlan(tp={"<script>alert(1)</script>": "colwise"}, tp_source="file")
    text = page(make_report(model, plan, model="<img src=x>", tp=2, pp=1))
    assert "<script>" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("name", ["plan.json", "plan.yaml"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    model = semantic_model()
    write_plan(plan_of(model), tmp_path / name, model)
    again = read_plan(tmp_path / name)
    assert again.as_document() == plan_of(model).as_document()
    assert yaml.safe_load((tmp_path / name).read_text())["tp_plan"] == dict(plan_of(model).tp)


def test_a_plan_in_a_config_is_read_by_transformers(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    plan = ParallelPlan(tp={"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": "rowwise"})
    write_plan(plan, tmp_path / "config.json", model)
    read = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert plan.tp.items() <= read.tp_plan.items()
    assert "model.layers.*.self_attn.q_proj" not in read.tp_plan
    assert plan.tp.items() <= choose_plan(read).tp.items()


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    for name in ("no/such/folder/plan.json", "plan.txt"):
        with pytest.raises(PlanError, match="plan"):
            write_plan(ParallelPlan(), tmp_path / name, semantic_model())
