"""`shardwright plan`: a model's parallel plan as resolved, inferred, checked and proved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from shardwright.cli.help import Command, examples
from shardwright.cli.options import Json, Model, engine_flags, with_flags
from shardwright.cli.output import only_results_on_stdout, print_json, print_text, remark, stderr, stdout
from shardwright.config import EngineConfig, ParallelConfig
from shardwright.garbage import start_of_process

if TYPE_CHECKING:
    from torch import nn

    from shardwright.plans.plan import ParallelPlan
    from shardwright.plans.prove.report import ProofReport
    from shardwright.plans.report import PlanReport

BUILDING = ("revision", "trust_remote_code", "tp_plan", "pp_plan", "enable_expert_parallel")
FLAGS = (*BUILDING, "dtype", "pp_split", "quantization", "quantization_group_size")

EXAMPLES = examples(
    "shardwright plan show ./my-model --tp 4",
    "shardwright plan check ./my-model --tp 4 --pp 2 --html report.html",
    "shardwright plan infer ./my-model --write plan.yaml",
    "shardwright plan prove ./my-model --tp 3 --tp-plan plan.yaml",
)

Tp = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks; 1: nothing is cut.")]
Pp = Annotated[int | None, typer.Option("--pp", min=1, help="Pipeline stages; default: 2 if there are layers to deal.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a report page: one HTML file.")]

SEVERITY_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}

app = typer.Typer(rich_markup_mode=None)


def register(root: typer.Typer) -> None:
    """Add the command to the program."""
    root.add_typer(app, name="plan", epilog=EXAMPLES)


@app.callback(invoke_without_command=True)
def plan(context: typer.Context) -> None:
    """Show, infer, check and prove how a model is cut for tensor and pipeline parallelism."""
    if context.invoked_subcommand is None:
        print_text(context.get_help())


@app.command("show", cls=Command, epilog=EXAMPLES)
@with_flags(engine=engine_flags(only=FLAGS))
@only_results_on_stdout()
def show(
    model: Model,
    *,
    tp: Tp = 2,
    pp: Pp = None,
    html: Html = None,
    json: Json = False,
    engine: dict[str, Any],
) -> None:
    """Show the plan as resolved: its entries, pieces, stages and memory per rank."""
    report, _ = look(model, engine, tp=tp, pp=pp)
    give(report, html=html, json=json, tables=True)


@app.command("infer", cls=Command, epilog=EXAMPLES)
@with_flags(engine=engine_flags(only=FLAGS))
@only_results_on_stdout()
def infer(
    model: Model,
    *,
    tp: Tp = 2,
    pp: Pp = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="FILE", help="Write the plan: .json, .yaml, or into a model's config.json."),
    ] = None,
    html: Html = None,
    json: Json = False,
    engine: dict[str, Any],
) -> None:
    """Make a plan from the model's code, whether or not it carries one."""
    report, module = look(model, engine, tp=tp, pp=pp, anew=True)
    if write is not None:
        write_for_all(report, module, write)
    give(report, html=html, json=json, tables=True)


@app.command("check", cls=Command, epilog=EXAMPLES)
@with_flags(engine=engine_flags(only=FLAGS))
@only_results_on_stdout()
def check(
    model: Model,
    *,
    tp: Tp = 2,
    pp: Pp = None,
    html: Html = None,
    json: Json = False,
    engine: dict[str, Any],
) -> None:
    """Say what is wrong with the plan, without weights: seconds, for a model of any size."""
    report, _ = look(model, engine, tp=tp, pp=pp)
    give(report, html=html, json=json, tables=False)


@app.command("prove", cls=Command, epilog=EXAMPLES)
@with_flags(engine=engine_flags(only=(*BUILDING, "pp_split")))
@only_results_on_stdout()
def prove(
    model: Model,
    *,
    tp: Tp = 2,
    pp: Pp = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Prove with the model's weights, not random ones.")
    ] = False,
    json: Json = False,
    engine: dict[str, Any],
) -> None:
    """Run all ranks in this process, and compare every module with the model that is not cut."""
    split = engine.pop("pp_split", None)
    config = EngineConfig.from_options(model, **engine, dtype="float32")
    with stderr().status(f"looking into {model}") as status:
        with start_of_process():
            from shardwright.plans.prove import prove_plan
            from shardwright.worker.blueprint import Blueprint
        blueprint = Blueprint.of(config.model)
        module = blueprint.load() if weights else blueprint.build(blueprint.dtype)
        stages = num_stages(module, pp, split)
        parallel = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=stages, pp_split=split)
        chosen = plan_for(module, config, tp=tp, pp=stages)
        proof = prove_plan(
            module,
            chosen,
            tp=tp,
            pp=stages,
            pp_split=parallel.layers_per_stage,
            weights=weights,
            progress=status.update,
        )
    if json:
        print_json(proof.as_json())
    else:
        show_proof(proof, model)
    if not proof.ok:
        raise typer.Exit(1)


def write_for_all(report: PlanReport, module: nn.Module, path: Path) -> None:
    """Write an inferred plan as other engines can carry it out too, and say where that is less than ours."""
    from shardwright.plans.portable import portable
    from shardwright.plans.report.write import write_plan
    from shardwright.plans.units import unit_groups

    groups = report.table.groups if report.table is not None else unit_groups(module, report.plan)
    plan = portable(report.plan, module, groups)
    write_plan(plan, path, module)
    remark(f"wrote the plan to {path}")
    if other := [pattern for pattern, style in report.plan.styles.items() if plan.styles.get(pattern) != style]:
        remark(
            f"{len(other)} of its entries cut less than is shown, for Transformers and vLLM cannot cut there "
            f"({other[0]}{', ...' if other[1:] else ''}); without a file, shardwright does"
        )


def look(
    model: str, engine: dict[str, Any], *, tp: int, pp: int | None, anew: bool = False
) -> tuple[PlanReport, nn.Module]:
    """The report on a model's plan, and the model on "meta".

    Args:
        model: as the user calls it.
        engine: options.
        tp: tensor-parallel ranks.
        pp: pipeline stages; None: 2 if there are layers to deal.
        anew: infer a plan whatever there is.

    Raises: a UsageError if the model cannot be built, or a plan not be read.
    """
    split = engine.pop("pp_split", None)
    config = EngineConfig.from_options(model, **engine)
    with stderr().status(f"looking into {model}") as status:
        with start_of_process():
            from shardwright.plans.quantization import quantization_of
            from shardwright.plans.report import make_report
            from shardwright.worker.blueprint import Blueprint
        blueprint = Blueprint.of(config.model)
        module = blueprint.build(blueprint.dtype)
        stages = num_stages(module, pp, split)
        parallel = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=stages, pp_split=split)
        status.update("following the model's dataflow")
        chosen = plan_for(module, config, tp=tp, pp=stages, anew=anew)
        report = make_report(
            module,
            chosen,
            model=model,
            tp=tp,
            pp=stages,
            pp_split=parallel.layers_per_stage,
            quantization=quantization_of(module, config.model.weight_format),
        )
    return report, module


def num_stages(module: nn.Module, pp: int | None, split: str | None) -> int:
    """Pipeline stages: as asked, as many as a split names, or 2 of a model that has layers."""
    from shardwright.plans.check import default_stages

    if pp is not None:
        return pp
    return split.count(",") + 1 if split is not None else default_stages(module)


def plan_for(module: nn.Module, config: EngineConfig, *, tp: int, pp: int, anew: bool = False) -> ParallelPlan:
    """The plan that counts. Raises PlanError if it cannot be read or inferred."""
    from shardwright.plans.choose import choose_plan

    if anew:
        from shardwright.plans.infer import infer_plan

        return infer_plan(module)
    return choose_plan(
        module,
        tp_file=config.parallel.tp_plan,
        pp_file=config.parallel.pp_plan,
        tp=tp,
        pp=pp,
        expert_parallel=config.parallel.enable_expert_parallel,
    )


def give(report: PlanReport, *, html: Path | None, json: bool, tables: bool) -> None:
    """Print a report, and write its page; leaves with exit code 1 if the plan is wrong."""
    if html is not None:
        from shardwright.plans.report.page import write_page

        write_page(report, html)
        remark(f"wrote the report to {html}")
    if json:
        print_json(report.as_json())
    else:
        show_report(report, tables=tables)
    if not report.ok:
        raise typer.Exit(1)


def show_report(report: PlanReport, *, tables: bool) -> None:
    """Print a report for people."""
    from shardwright.plans.report import text

    console = stdout()
    console.print(Text(text.heading(report), style="bold"), soft_wrap=True)
    if tables and report.table is not None:
        draw(("entry", "style", "weights", "shape", "pieces"), text.entry_rows(report))
        draw(("stage", "modules", "layers", "weights"), text.stage_rows(report))
        draw(("rank", "stage", "tp rank", "weights"), text.memory_rows(report))
    for finding in report.check.findings:
        severity, *rest = finding.lines()
        word, _, where = severity.partition(": ")
        console.print(Text.assemble((word, SEVERITY_STYLES[word]), f": {where}"), soft_wrap=True)
        for line in rest:
            console.print(Text(line), soft_wrap=True)
    console.print(Text(report.check.summary), soft_wrap=True)


def draw(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table; lines longer than the terminal go on in the next, and are whole when they are copied."""
    console, table = stdout(), [columns, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for number, row in enumerate(table):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        console.print(Text(line, style="dim" if number == 0 else ""), soft_wrap=True)
    console.print()


def show_proof(proof: ProofReport, model: str) -> None:
    """Print a proof for people."""
    console = stdout()

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    say(f"{model} on {proof.tp} x {proof.pp} ranks (tp x pp), {proof.modules_compared} modules compared", "bold")
    if found := proof.first_divergence:
        say(f"error: {found.module or 'the output'}", SEVERITY_STYLES["error"])
        say(f"       {found.message}")
        if found.likely_entry is not None:
            say(f"       likely entry: {found.likely_entry}")
        if found.fix is not None:
            tried = ", with which the proof holds" if found.fix_holds else ""
            say(f"       fix: {found.fix}{tried}")
    for note in proof.notes:
        say(f"note: {note}")
    verdict = "holds" if proof.ok else "does not hold"
    say(f"{verdict}: largest difference {proof.max_abs_diff:.2g} in {proof.dtype}, {proof.tolerance:.2g} allowed")
