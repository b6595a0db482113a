"""`shardwright bench`: the standard workloads, each beside what the machine could do at best.

`bench serve` has a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from shardwright.bench import workloads
from shardwright.cli import bench_serve
from shardwright.cli.bench_output import latencies, measure_device, print_machine
from shardwright.cli.help import Command, examples
from shardwright.cli.options import Json, Model, engine_flags, with_flags
from shardwright.cli.output import announce, only_results_on_stdout, print_json, print_text, remark, stdout, working
from shardwright.errors import UsageError

EXAMPLES = examples(
    "shardwright bench decode smollm2-135m",
    "shardwright bench prefill ./my-model --dtype bfloat16 --repeat 3",
    "shardwright bench serve smollm2-135m --rate 1 --rate 4",
    "shardwright bench all smollm2-135m --json > bench.json",
)

Repeat = Annotated[int, typer.Option(min=1, help="Runs of each measurement; the fastest counts.")]

app = typer.Typer(rich_markup_mode=None)
bench_serve.register(app)


def register(root: typer.Typer) -> None:
    """Add the command to the program."""
    root.add_typer(app, name="bench", epilog=EXAMPLES)


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure throughput, latency and start-up beside the machine's bandwidth and GEMM bound."""
    if context.invoked_subcommand is None:
        print_text(context.get_help())


@app.command("decode", cls=Command, epilog=EXAMPLES)
@with_flags(engine=engine_flags())
@only_results_on_stdout()
def decode(model: Model, *, repeat: Repeat = 2, json: Json = False, engine: dict[str, Any]) -> None:
    """Run decode-1, decode-8, decode-32 and mixed-32."""
    show(measure(model, engine, names=workloads.DECODE, repeat=repeat), json=json)


@app.command("prefill", cls=Command, epilog=EXAMPLES)
@with_flags(engine=engine_flags())
@only_results_on_stdout()
def prefill(model: Model, *, repeat: Repeat = 2, json: Json = False, engine: dict[str, Any]) -> None:
    """Run prefill and shared-prefix."""
    show(measure(model, engine, names=workloads.PREFILL, repeat=repeat), json=json)


@app.command("start", cls=Command, epilog=EXAMPLES)
@with_flags(engine=engine_flags())
@only_results_on_stdout()
def start(model: Model, *, repeat: Repeat = 2, json: Json = False, engine: dict[str, Any]) -> None:
    """Start the engine in a fresh process and wait for its first token."""
    show(measure(model, engine, start=True, repeat=repeat), json=json)


@app.command("all", cls=Command, epilog=EXAMPLES)
@with_flags(engine=engine_flags())
@only_results_on_stdout()
def everything(model: Model, *, repeat: Repeat = 2, json: Json = False, engine: dict[str, Any]) -> None:
    """Run every workload and the start."""
    show(measure(model, engine, names=workloads.ALL, start=True, repeat=repeat), json=json)


def measure(
    model: str, engine: dict[str, Any], *, names: Iterable[str] = (), start: bool = False, repeat: int
) -> dict[str, Any]:
    """The document of `bench --json`."""
    document: dict[str, Any] = {"machine": None, "model": model, "workloads": []}
    if start:  # before this process fills memory with an engine of its own
        from shardwright.bench.start import measure_best_start

        with working(f"starting {model} in a fresh process"):
            document["start"] = measure_best_start(model, engine, repeat=repeat).as_json()
    chosen = workloads.choose(names)
    if chosen:
        document |= measure_workloads(model, engine, chosen, repeat=repeat)
    else:
        document["machine"] = measure_device(engine.get("device", "auto")).as_json()
    return document


def measure_workloads(
    model: str, engine: dict[str, Any], chosen: list[workloads.Workload], *, repeat: int
) -> dict[str, Any]:
    """Run workloads on one engine. Raises UsageError if the model can run none of them."""
    from shardwright.bench.bound import Weights
    from shardwright.bench.run import measure_best, obstacle, warm_up, workload_as_json
    from shardwright.llm import LLM

    announce(f"loading {model}")
    with LLM(model, **engine) as llm:
        skipped = [{"name": w.name, "reason": reason} for w in chosen if (reason := obstacle(w, llm))]
        for entry in skipped:
            remark(f"skipping {entry['name']}: {entry['reason']}")
        runnable = [w.for_vocabulary(llm.info.vocab_size) for w in chosen if not obstacle(w, llm)]
        if not runnable:
            raise UsageError(f"{model} can run none of the workloads: {skipped[0]['name']} {skipped[0]['reason']}")
        machine = measure_device(llm.info.device)
        weights = Weights.of_engine(llm.info)
        warm_up(llm)
        runs = []
        for workload in runnable:
            with working(f"{workload.name}, {repeat} times"):
                runs.append((workload, measure_best(llm, workload, repeat=repeat)))
            machine = machine.at_best(measure_device(llm.info.device))  # it may have been busy before
        return {
            "machine": machine.as_json(),
            "dtype": llm.info.dtype,
            "device": llm.info.device,
            "workloads": [workload_as_json(*run, weights=weights, machine=machine) for run in runs],
            "skipped": skipped,
        }


def show(document: dict[str, Any], *, json: bool) -> None:
    """Print the document for a program or for a person."""
    if json:
        print_json(document)
        return
    console = stdout()
    print_machine(document["machine"])
    if document["workloads"]:
        console.print(workload_table(document))
    if started := document.get("start"):
        console.print(
            f"start: ready after {started['ready_s']:.2f} s, first token after {started['first_token_s']:.2f} s,"
            f" peak memory {started['peak_rss_mib']:.0f} MiB (files in the page cache)",
            soft_wrap=True,
        )


def workload_table(document: dict[str, Any]) -> Table:
    """One row per workload: its speed, the bound and the share of it, and the latencies in milliseconds."""
    table = Table(
        title=f"{document['model']}, {document['dtype']} on {document['device']}; latencies in ms: p50/p90/p99",
        caption="* tokens of prompt and output together",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("workload", no_wrap=True)
    for column in ("tok/s", "bound", "of bound", "TTFT", "ITL"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in document["workloads"]:
        speed = row[f"{row['headline']}_tokens_per_s"]
        table.add_row(
            row["name"] + ("*" if row["headline"] == "total" else ""),
            f"{speed:.1f}",
            f"{row['bound_tokens_per_s']:.1f}",
            f"{row['fraction_of_bound']:.0%}",
            latencies(row["ttft_s"]),
            latencies(row["itl_s"]),
        )
    return table
