"""`shardwright bench serve`: requests that arrive over time, at a server, and what their clients see."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from shardwright.cli.bench_output import latencies, measure_device, print_machine
from shardwright.cli.help import Command, examples
from shardwright.cli.options import Json, engine_flags, with_flags
from shardwright.cli.output import only_results_on_stdout, print_json, remark, stderr, stdout, working
from shardwright.errors import EngineError, UsageError

if TYPE_CHECKING:
    from shardwright.bench.bound import Weights
    from shardwright.bench.http_stream import Server
    from shardwright.bench.load import Load
    from shardwright.bench.machine import Machine
    from shardwright.bench.served import Card, Served, Status

EXAMPLES = examples(
    "shardwright bench serve smollm2-135m --rate 1 --rate 2 --rate 4",
    "shardwright bench serve ./my-model --rate 0.5 --num-requests 50 --prompt-tokens 1024 --output-tokens 32",
    "shardwright bench serve --url http://127.0.0.1:8000 --rate 2 --json > served.json",
)

DEFAULT_RATE = 1.0

ModelOrName = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="What to serve, as for `serve`. With --url, the model's name there; default: the first that it lists.",
    ),
]
Rate = Annotated[
    list[float] | None,
    typer.Option(help=f"Requests per second, on average; once for each load. Default: {DEFAULT_RATE:g}."),
]
NumRequests = Annotated[int, typer.Option(min=1, help="Requests of each load.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")]
OutputTokens = Annotated[int, typer.Option(min=1, help="Tokens generated for each, past end-of-sequence.")]
ArrivalSeed = Annotated[int, typer.Option("--seed", help="Of the moments at which requests arrive.")]
Url = Annotated[
    str | None, typer.Option(help="A running server of OpenAI's API to ask; default: one is started, and ended.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(help="Key of the server; default: SHARDWRIGHT_API_KEY or OPENAI_API_KEY of the environment."),
]
VocabSize = Annotated[
    int | None, typer.Option(min=1, help="Of the model at --url, if that does not tell; prompts have smaller ids.")
]


def register(app: typer.Typer) -> None:
    """Add the command to `bench`."""
    app.command("serve", cls=Command, epilog=EXAMPLES)(serve)


@with_flags(engine=[flag for flag in engine_flags() if flag.name != "seed"])
@only_results_on_stdout()
def serve(
    model: ModelOrName = None,
    *,
    rate: Rate = None,
    num_requests: NumRequests = 100,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 64,
    seed: ArrivalSeed = 0,
    url: Url = None,
    api_key: ApiKey = None,
    vocab_size: VocabSize = None,
    json: Json = False,
    engine: dict[str, Any],
) -> None:
    """Send a Poisson load to a real server, and measure latencies and throughput as its clients see them."""
    from shardwright.bench.http_stream import Server
    from shardwright.bench.load import loads

    chosen = loads(
        rate or [DEFAULT_RATE],
        num_requests=num_requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=seed,
    )
    key = api_key or os.environ.get("SHARDWRIGHT_API_KEY") or os.environ.get("OPENAI_API_KEY")
    device = engine.get("device", "auto")
    with sigterm_as_ctrl_c():
        if url is not None:
            check_no_engine_options(engine)
            server = Server(url.rstrip("/").removesuffix("/v1"), key)
            session = Session(server, chosen, name=model, vocab_size=vocab_size, machine=measure_device(device))
            session.run()
        else:
            session = serve_and_run(model, engine, chosen, key=key, device=device)
    if not session.is_interrupted:
        session.machine = session.machine.at_best(measure_device(device))  # it may have been busy the first time
    report(session, json=json)


def check_no_engine_options(engine: dict[str, Any]) -> None:
    """Raises UsageError for an option of an engine that runs already."""
    for flag in engine_flags():
        if engine.get(flag.name, flag.default) != flag.default:
            raise UsageError(f"--{flag.name.replace('_', '-')} is for a server started here: leave --url out")


def serve_and_run(
    model: str | None, engine: dict[str, Any], chosen: list[Load], *, key: str | None, device: str
) -> Session:
    """Start a server, run the loads, end it."""
    from shardwright.bench.http_stream import Server
    from shardwright.bench.server_process import served_model
    from shardwright.config import EngineConfig
    from shardwright.models.resolve import home_directory

    if model is None:
        raise UsageError("no model: name one to serve, or a running server with --url")
    path = home_directory(EngineConfig.from_options(model, **engine).model)  # tells what is wrong before anything runs
    machine = measure_device(device)
    with contextlib.ExitStack() as stack:
        with working(f"starting a server of {model}"):
            url = stack.enter_context(served_model(model, engine))
        session = Session(Server(url, key), chosen, machine=machine, path=path)
        session.run()
    return session


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """End the server whatever ends this process."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Session:
    """The loads of one command at one server.

    Args:
        name: of the model in the API; None: the first that the server lists.
        vocab_size: of its model, in case it does not tell.
        machine: for the bounds.
        path: the model's directory; None: where the server says it is, if that is a directory here.
    """

    def __init__(
        self,
        server: Server,
        loads: list[Load],
        *,
        machine: Machine,
        name: str | None = None,
        vocab_size: int | None = None,
        path: Path | None = None,
    ) -> None:
        self.machine = machine
        self.served: list[Served] = []
        self.is_interrupted = False
        self._server = server
        self._loads = loads
        self._name = name
        self._vocab_size = vocab_size
        self._path = path
        self.card: Card | None = None
        self.status: Status | None = None

    def run(self) -> None:
        """Run all loads. Ctrl-C ends them, and what was measured so far stays."""
        try:
            asyncio.run(self._run())
        except KeyboardInterrupt:
            if not any(served.sent for served in self.served):
                raise
            self.is_interrupted = True

    @property
    def model(self) -> str:
        """Its name in the API."""
        assert self.card is not None
        return self._name or self.card.id

    def weights(self) -> Weights | None:
        """Of the model served, if the server tells."""
        from shardwright.bench.bound import Weights

        if self.status is None or self.card is None:
            return None
        path = self._path or Path(self.card.root)
        return Weights.of_model(
            str(path) if self.card.root and path.is_dir() else "",
            num_parameters=self.status.num_parameters,
            weight_bytes=self.status.weight_bytes,
            vocab_size=self.status.vocab_size,
        )

    async def _run(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from shardwright.bench.served import Served, offer, read_card, read_status, warm_up

        self.card, self.status = await read_card(self._server), await read_status(self._server)
        self._check_length(self._loads[0].longest, self.card)
        vocab_size = self.status.vocab_size if self.status is not None else self._vocab_size
        await warm_up(self._server, self.model, prompt_tokens=self._loads[0].prompt_tokens, vocab_size=vocab_size)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=stderr()) as progress:
            for load in self._loads:
                task = progress.add_task(f"{load.rate:g} requests/s", total=load.num_requests)
                self.served.append(Served.of(load))
                await offer(
                    self._server,
                    self.model,
                    self.served[-1],
                    vocab_size=vocab_size,
                    on_answer=partial(progress.advance, task),
                )

    def _check_length(self, longest: int, card: Card) -> None:
        if card.max_model_len is not None and longest > card.max_model_len:
            raise UsageError(
                f"a request has {longest} tokens, but max_model_len is {card.max_model_len}: "
                "give a smaller --prompt-tokens or --output-tokens"
            )


def report(session: Session, *, json: bool) -> None:
    """Print what was measured. Raises EngineError if a request failed, and KeyboardInterrupt after Ctrl-C."""
    from shardwright.bench.served import served_as_json

    weights = session.weights()
    document: dict[str, Any] = {
        "machine": session.machine.as_json(),
        "model": session.model,
        "workloads": [
            served_as_json(served, weights=weights, machine=session.machine) for served in session.served if served.sent
        ],
        "interrupted": session.is_interrupted,
    }
    if session.status is not None:
        document |= {"dtype": session.status.dtype, "device": session.status.device}
    if json:
        print_json(document)
    else:
        print_machine(document["machine"])
        stdout().print(load_table(document))
    if session.is_interrupted:
        remark("ended early: the numbers are those of the requests sent until then")
        raise KeyboardInterrupt
    for row in document["workloads"]:
        for reason, count in row["failures"].items():
            raise EngineError(f"{count} of {row['requests']} requests at {row['rate']:g}/s failed: {reason}")


def load_table(document: dict[str, Any]) -> Table:
    """One row per load, latencies in milliseconds."""
    what = [document["model"], f"{document['dtype']} on {document['device']}" if "dtype" in document else None]
    first = document["workloads"][0]
    table = Table(
        title=f"{', '.join(filter(None, what))}; latencies in ms: p50/p90/p99",
        caption=f"rate: requests/s asked for and as sent; each wants {first['output_tokens_each']} tokens after "
        f"{first['prompt_tokens_each']}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    has_losses = any(row["failed"] or row["unfinished"] for row in document["workloads"])
    for column in ("rate", "sent", *(("done",) if has_losses else ()), "tok/s", "of bound", "TTFT", "ITL", "latency"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in document["workloads"]:
        fraction = row["fraction_of_bound"]
        table.add_row(
            f"{row['rate']:g}",
            "-" if row["offered_rate"] is None else f"{row['offered_rate']:.3g}",
            *((str(row["requests"] - row["failed"] - row["unfinished"]),) if has_losses else ()),
            f"{row['output_tokens_per_s']:.1f}",
            "-" if fraction is None else f"{fraction:.0%}",
            *(latencies(row[name]) for name in ("ttft_s", "itl_s", "latency_s")),
        )
    return table
