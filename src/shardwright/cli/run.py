"""`shardwright run`: generate in this process, without a server."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from shardwright.cli.help import Command, examples
from shardwright.cli.options import Json, Model, engine_flags, sampling_flags, with_flags
from shardwright.cli.output import (
    announce,
    only_results_on_stdout,
    print_json,
    print_text,
    process_age_s,
    remark,
    stdout,
)
from shardwright.cli.prompts import check_text, read_prompts
from shardwright.config import EngineConfig
from shardwright.errors import UsageError
from shardwright.garbage import start_of_process
from shardwright.outputs import CompletionOutput, Logprob, RequestOutput
from shardwright.sampling_params import SamplingParams

if TYPE_CHECKING:
    from shardwright.llm import LLM

MAX_TOKENS = 256

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write. vLLM does the same."""

EXAMPLES = examples(
    'shardwright run smollm2-135m "Once upon a time"',
    'shardwright run smollm2-135m --chat "Name three rivers." --temperature 0',
    "shardwright run ./my-model --prompt-token-ids 1,2,3 --max-tokens 8 --ignore-eos --json",
    "cat prompts.txt | shardwright run ./my-model --json > answers.json",
)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("run", cls=Command, epilog=EXAMPLES)(run)


@with_flags(sampling=sampling_flags(max_tokens=MAX_TOKENS), engine=engine_flags())
@only_results_on_stdout()
def run(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to go on from; default: the lines of stdin.")
    ] = None,
    *,
    prompt_token_ids: Annotated[
        list[str] | None, typer.Option(metavar="1,2,3", help="A prompt as token ids; may be repeated.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message before each prompt; implies --chat.")] = None,
    json: Json = False,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Generate text in this process, and stream it to the terminal.

    One prompt streams as it is generated; of several, the results are printed in order once all are done.
    """
    params = SamplingParams(**sampling)
    texts = read_prompts(prompts or [], prompt_token_ids or [])
    if system is not None:
        check_text(system, "--system")
    announce(f"loading {model}")
    with start_of_process():
        from shardwright.engine.start import own_process
        from shardwright.llm import LLM

        config = EngineConfig.from_options(model, **engine)
        own_process(config)
        engine_of_model = LLM.from_config(config)
    with engine_of_model as llm:
        ready_s = process_age_s()
        check_generates(llm)
        inputs = [as_input(llm, text, chat=chat or system is not None, system=system) for text in texts]
        start = time.perf_counter()
        alone = len(inputs) == 1 and params.n == 1 and not json
        if alone:
            outputs = [stream_one(llm, inputs[0], params)]
        else:
            outputs = llm.generate(inputs, params, use_tqdm=sys.stderr.isatty())
        metrics = run_metrics(outputs, ready_s=ready_s, elapsed_s=time.perf_counter() - start)
    if json:
        print_json({"model": model, "requests": [as_json(output) for output in outputs], "metrics": metrics})
        return
    if not alone:
        print_results(llm, outputs)
    print_logprobs(outputs)
    first = f", first token after {ttft:.2f} s" if alone and (ttft := outputs[0].metrics.ttft_s) else ""
    remark(
        f"{metrics['prompt_tokens']} prompt + {metrics['output_tokens']} output tokens in {metrics['elapsed_s']:.2f} s"
        f" ({metrics['output_tokens_per_s']:.1f} tok/s{first}); ready after {ready_s:.1f} s"
    )


def check_generates(llm: LLM) -> None:
    """Raise UsageError if the model does something else with texts."""
    info = llm.info
    if info.task != "generate":
        path = "/v1/embeddings" if info.task == "embed" else "/classify"
        raise UsageError(
            f"{info.model} ({info.architecture}) generates no text, it can {info.task} some: with LLM.{info.task} in "
            f"Python, or with `shardwright serve {info.model}` and POST {path}"
        )


def as_input(llm: LLM, text: str | list[int], *, chat: bool, system: str | None) -> dict[str, Any]:
    """What the engine takes for one prompt; token ids go in as they are."""
    if not isinstance(text, str):
        return {"prompt_token_ids": text}
    if not chat:
        return {"prompt": text}
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"prompt_token_ids": llm.tokenizer.apply_chat_template(messages)}


def stream_one(llm: LLM, prompt: dict[str, Any], params: SamplingParams) -> RequestOutput:
    """Print one completion as it comes. Returns: the whole of it."""
    whole = CompletionOutput(index=0, text="", token_ids=[], logprobs=[] if params.logprobs is not None else None)
    for _, delta in llm.stream([prompt], params):
        for news in delta.outputs:
            print_text(news.text or ids_without_text(llm, news), end="")
            whole.text += news.text
            whole.token_ids += news.token_ids
            if whole.logprobs is not None:
                whole.logprobs += news.logprobs or []
            whole.finish_reason = news.finish_reason
    print_text("")
    delta.outputs = [whole]
    return delta


def run_metrics(outputs: Sequence[RequestOutput], *, ready_s: float, elapsed_s: float) -> dict[str, Any]:
    """The sums over all requests of `run --json`."""
    output_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return {
        "ready_s": round(ready_s, 3),
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "output_tokens": output_tokens,
        "speculative_proposed_tokens": sum(output.metrics.num_proposed_tokens for output in outputs),
        "speculative_accepted_tokens": sum(output.metrics.num_accepted_tokens for output in outputs),
        "elapsed_s": round(elapsed_s, 4),
        "output_tokens_per_s": round(output_tokens / elapsed_s, 2),
    }


def as_json(output: RequestOutput) -> dict[str, Any]:
    """One request of `run --json`."""
    return {
        "prompt_token_ids": output.prompt_token_ids,
        "outputs": [completion_as_json(completion) for completion in output.outputs],
        "metrics": {
            "ttft_s": output.metrics.ttft_s,
            "latency_s": output.metrics.latency_s,
            "num_cached_tokens": output.metrics.num_cached_tokens,
            "num_proposed_tokens": output.metrics.num_proposed_tokens,
            "num_accepted_tokens": output.metrics.num_accepted_tokens,
        },
        **({} if output.prompt_logprobs is None else {"prompt_logprobs": logprobs_as_json(output.prompt_logprobs)}),
    }


def completion_as_json(completion: CompletionOutput) -> dict[str, Any]:
    """One of a request's completions."""
    document: dict[str, Any] = {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        document["logprobs"] = logprobs_as_json(completion.logprobs)
    return document


def logprobs_as_json(positions: Sequence[dict[int, Logprob] | None]) -> list[dict[str, Any] | None]:
    """Per token: {token id: {logprob, rank, decoded_token}}."""
    return [
        None if position is None else {str(t): logprob_as_json(e) for t, e in position.items()}
        for position in positions
    ]


def logprob_as_json(entry: Logprob) -> dict[str, Any]:
    """One candidate for one token."""
    logprob = max(entry.logprob, LEAST_LOGPROB)
    return {"logprob": logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}


def ids_without_text(llm: LLM, completion: CompletionOutput) -> str:
    """Token ids, each with a space behind, of a model that has no tokenizer; nothing for others."""
    from shardwright.models.no_tokenizer import NoTokenizer

    return "".join(f"{token} " for token in completion.token_ids) if isinstance(llm.tokenizer, NoTokenizer) else ""


def print_results(llm: LLM, outputs: Sequence[RequestOutput]) -> None:
    """Print several completions, each below a line that names it."""
    for number, output in enumerate(outputs, start=1):
        for completion in output.outputs:
            of = f", completion {completion.index + 1}" if len(output.outputs) > 1 else ""
            prompt = " ".join(output.prompt.split()) if output.prompt is not None else "token ids"
            print_text(
                f"--- prompt {number}{of}: {prompt[:60]}\n{completion.text or ids_without_text(llm, completion)}"
            )


def print_logprobs(outputs: Sequence[RequestOutput]) -> None:
    """Show the log-probabilities that were asked for, beside the result."""
    for output in outputs:
        for completion in output.outputs:
            if completion.logprobs is None:
                continue
            table = Table("token", "logprob", "rank", "likeliest")
            for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
                chosen = position[token]
                best = sorted(position.values(), key=lambda entry: entry.rank)
                likeliest = "  ".join(f"{entry.decoded_token!r} {entry.logprob:.3f}" for entry in best)
                table.add_row(
                    *map(Text, (repr(chosen.decoded_token), f"{chosen.logprob:.3f}", str(chosen.rank), likeliest))
                )
            stdout().print(table)
