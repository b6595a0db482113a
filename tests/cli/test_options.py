from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeAlias

import pytest
import typer

from shardwright.cli.options import engine_flags, record_flags, sampling_flags, with_flags
from shardwright.config import engine_options
from shardwright.server import ServerConfig

if TYPE_CHECKING:
    from tests.cli.conftest import Result

Shardwright: TypeAlias = "Callable[..., Result]"

PROMISED = {
    "run": "--chat --prompt-token-ids --max-tokens --temperature --top-p --top-k --min-p --seed --stop --n --logprobs "
    "--ignore-eos --dtype --max-model-len --max-num-seqs --max-num-batched-tokens --block-size "
    "--gpu-memory-utilization --kv-cache-memory-bytes --enable-prefix-caching --no-enable-prefix-caching "
    "--enable-chunked-prefill --no-enable-chunked-prefill --trust-remote-code --tokenizer --load-format --device "
    "--json --tensor-parallel-size -tp --pipeline-parallel-size -pp --data-parallel-size -dp --tp-plan --pp-plan "
    "--distributed-executor-backend --quantization --enforce-eager --self-check --no-self-check --speculative-method "
    "--speculative-model --num-speculative-tokens --prompt-lookup-max --prompt-lookup-min --speculative-step-tokens",
    "serve": "--host --port --api-key --root-path --ssl-keyfile --ssl-certfile --uvicorn-log-level --allowed-origins "
    "--served-model-name --chat-template --dtype --max-model-len --seed --kv-cache-memory-bytes "
    "--tensor-parallel-size -tp --pipeline-parallel-size -pp --data-parallel-size -dp --tp-plan --pp-plan "
    "--distributed-executor-backend --quantization --enforce-eager --self-check --no-self-check",
    "complete": "--url --model --api-key --max-tokens --quick -q --json",
    "chat": "--url --model --api-key --max-tokens --quick -q --json",
    "models": "--url --api-key --json",
    "inspect": "--depth --params --json --trust-remote-code",
    "bench decode": "--json --repeat --dtype --kv-cache-memory-bytes",
    "bench prefill": "--json --repeat --dtype",
    "bench serve": "--json --rate --num-requests --prompt-tokens --output-tokens --seed --url --api-key --dtype",
    "bench start": "--json --repeat --dtype",
    "bench all": "--json --repeat --dtype",
}
"""Flags that scripts rely on: add freely, take none away."""


@pytest.mark.parametrize("command", PROMISED)
def test_promised_flags_are_there(shardwright: Shardwright, command: str) -> None:
    result = shardwright(*command.split(), "--help")
    assert result.code == 0
    words = set(result.stdout.replace(",", " ").split())
    assert set(PROMISED[command].split()) <= words
    assert "Examples:" in result.stdout


def test_every_engine_option_is_a_flag_with_its_help_and_default() -> None:
    flags = {flag.name: flag for flag in engine_flags()}
    for _, option in engine_options():
        assert flags[option.name].help == option.metadata["help"]
        assert flags[option.name].default == option.default


def test_every_sampling_parameter_that_can_be_typed_is_documented() -> None:
    flags = {flag.name: flag for flag in sampling_flags(max_tokens=3)}
    assert flags["max_tokens"].default == 3
    assert flags["top_p"].help.startswith("Keep the smallest set")
    assert "logit_bias" not in flags


def call(*arguments: str) -> dict[str, object]:
    """What a command with engine and server flags gets."""
    got: dict[str, object] = {}
    app = typer.Typer()

    @app.command()
    @with_flags(server=record_flags(ServerConfig), engine=engine_flags())
    def command(
        name: Annotated[str, typer.Argument()], *, server: dict[str, object], engine: dict[str, object]
    ) -> None:
        got.update(name=name, server=server, engine=engine)

    app(list(arguments), standalone_mode=False)
    return got


def test_sizes_have_short_names_and_options_a_section_per_record(shardwright: Shardwright) -> None:
    got = call("x", "-tp", "2", "-pp", "3", "-dp", "4")
    assert (
        got["engine"] | {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "data_parallel_size": 4}
        == (got["engine"])
    )
    sections = [line for line in shardwright("serve", "--help").stdout.splitlines() if line.endswith(" options:")]
    assert {"Model options:", "Cache options:", "Scheduler options:", "Parallel options:"} <= set(sections)


def test_a_group_gets_its_values_under_the_names_of_the_fields() -> None:
    got = call(
        "x", "--kv-cache-memory-bytes", "2GiB", "--no-enable-prefix-caching", "--port", "9", "--dtype", "float32"
    )
    assert got["name"] == "x"
    engine = got["engine"]
    assert isinstance(engine, dict)
    assert engine["kv_cache_memory_bytes"] == 2 * 2**30
    assert engine["enable_prefix_caching"] is False
    assert engine["dtype"] == "float32"
    assert "max_model_len" not in engine
    assert ServerConfig(**got["server"]).port == 9  # type: ignore[arg-type]


def test_what_is_not_given_leaves_the_records_as_they_are() -> None:
    got = call("x")
    assert ServerConfig(**got["server"]) == ServerConfig()  # type: ignore[arg-type]
