"""`run` and `bench` on a tiny model, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
from tests.pooling.models import bert_config, save
from transformers import BertModel

if TYPE_CHECKING:
    from tests.cli.conftest import Result

Shardwright: TypeAlias = "Callable[..., Result]"

CACHE = ("--kv-cache-memory-bytes", "16MiB")
GREEDY = ("--temperature", "0", "--max-tokens", "8", "--ignore-eos")


@pytest.fixture
def run(shardwright: Shardwright, tiny_llama: Path) -> Shardwright:
    return lambda *arguments, stdin=b"": shardwright("run", str(tiny_llama), *CACHE, *GREEDY, *arguments, stdin=stdin)


def test_json_has_every_request_and_the_sums(run: Shardwright) -> None:
    result = run("Hello", "--prompt-token-ids", "5,6,7", "--json")
    document = result.json
    assert (result.code, len(document["requests"])) == (0, 2)
    first, second = document["requests"]
    assert len(first["prompt_token_ids"]) == 5
    assert second["prompt_token_ids"] == [5, 6, 7]
    [output] = second["outputs"]
    assert (len(output["token_ids"]), output["finish_reason"]) == (8, "length")
    assert "logprobs" not in output
    assert set(second["metrics"]) >= {"ttft_s", "latency_s"}
    metrics = document["metrics"]
    assert (metrics["prompt_tokens"], metrics["output_tokens"]) == (8, 16)
    assert metrics["output_tokens_per_s"] > 0
    assert metrics["ready_s"] > 0


def test_guessing_ahead_is_counted_and_changes_no_token(run: Shardwright, tiny_llama: Path) -> None:
    prompts = ("Hello", "--prompt-token-ids", "5,6,7", "--json")
    plain, guessed = run(*prompts).json, run(*prompts, "--speculative-model", str(tiny_llama)).json
    assert [one["outputs"] for one in guessed["requests"]] == [one["outputs"] for one in plain["requests"]]
    metrics = [document["metrics"] for document in (plain, guessed)]
    assert [one["speculative_proposed_tokens"] > 0 for one in metrics] == [False, True]
    assert 0 < metrics[1]["speculative_accepted_tokens"] <= metrics[1]["speculative_proposed_tokens"]
    own = [one["metrics"]["num_proposed_tokens"] for one in guessed["requests"]]
    assert sum(own) == metrics[1]["speculative_proposed_tokens"]


def test_one_prompt_streams_the_same_text(run: Shardwright) -> None:
    [output] = run("Hello", "--json").json["requests"][0]["outputs"]
    result = run("Hello")
    assert (result.code, result.stdout) == (0, output["text"] + "\n")
    assert "5 prompt + 8 output tokens in" in result.stderr


def test_lines_of_stdin_are_prompts(run: Shardwright) -> None:
    requests = run("--json", stdin="ab\n\ncd ü\n".encode()).json["requests"]
    assert [len(request["prompt_token_ids"]) for request in requests] == [2, 5]


def test_several_prompts_are_told_apart(run: Shardwright) -> None:
    result = run("ab", "cd")
    assert "--- prompt 1: ab\n" in result.stdout
    assert "--- prompt 2: cd\n" in result.stdout


def test_chat_goes_through_the_template(run: Shardwright) -> None:
    [plain] = run("hi", "--json").json["requests"]
    [chat] = run("hi", "--chat", "--json").json["requests"]
    [system] = run("hi", "--system", "be kind", "--json").json["requests"]
    lengths = [len(request["prompt_token_ids"]) for request in (plain, chat, system)]
    assert lengths == sorted(set(lengths))


def test_logprobs_are_listed_by_token(run: Shardwright) -> None:
    [output] = run("Hello", "--logprobs", "2", "--json").json["requests"][0]["outputs"]
    assert len(output["logprobs"]) == 8
    chosen = output["logprobs"][0][str(output["token_ids"][0])]
    assert chosen["rank"] == 1
    assert chosen["logprob"] < 0
    assert isinstance(chosen["decoded_token"], str)
    assert "likeliest" in run("Hello", "--logprobs", "2").stdout


def test_a_seed_makes_samples_repeat(run: Shardwright) -> None:
    def sample(seed: str) -> list[list[int]]:
        outputs = run("Hello", "--temperature", "1", "--n", "3", "--seed", seed, "--json").json["requests"][0][
            "outputs"
        ]
        return [output["token_ids"] for output in outputs]

    assert sample("1") == sample("1") != sample("2")


def test_stop_strings_may_be_repeated(run: Shardwright) -> None:
    [output] = run("Hello", "--json").json["requests"][0]["outputs"]
    [stopped] = run("Hello", "--json", "--stop", "~~~", "--stop", output["text"][3]).json["requests"][0]["outputs"]
    assert stopped["finish_reason"] == "stop"
    assert output["text"].startswith(stopped["text"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt-token-ids", "1,9999"], "9999"),
        (["x" * 300], "256"),
        ([""], "prompt"),
        (["hi", "--max-model-len", "100000"], "256"),
        (["hi", "--n", "2"], "temperature"),
    ],
)
def test_requests_that_cannot_run_are_exit_code_2(run: Shardwright, arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert (result.code, result.stdout) == (2, "")
    assert says in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [("a",), ("--chat", "a"), ("--json", "--prompt-token-ids", "1,2")])
def test_an_encoder_says_what_to_do_instead(shardwright: Shardwright, tmp_path: Path, arguments: list[str]) -> None:
    save(BertModel, bert_config(), tmp_path)
    result = shardwright("run", str(tmp_path), *arguments)
    assert (result.code, result.stdout) == (2, "")
    assert "generates no text, it can embed some" in result.stderr.splitlines()[-1]
    assert "/v1/embeddings" in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_machine")
def test_bench_decode_reports_each_workload_beside_its_bound(shardwright: Shardwright, tiny_llama: Path) -> None:
    document = shardwright("bench", "decode", str(tiny_llama), *CACHE, "--repeat", "1", "--json").json
    assert [row["name"] for row in document["workloads"]] == ["decode-1", "decode-8", "decode-32", "mixed-32"]
    assert {"cpu", "cores", "read_gb_per_s", "gemm_gflop_per_s"} <= set(document["machine"])
    for row in document["workloads"]:
        assert row["output_tokens_per_s"] > 0
        assert row["fraction_of_bound"] > 0
        assert set(row["ttft_s"]) == set(row["itl_s"]) == {"p50", "p90", "p99"}


@pytest.mark.usefixtures("quick_machine")
def test_bench_refuses_a_model_too_short_for_all_workloads(shardwright: Shardwright, tiny_llama: Path) -> None:
    result = shardwright("bench", "prefill", str(tiny_llama), *CACHE)
    assert (result.code, result.stdout) == (2, "")
    assert "needs 1025 tokens" in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_machine")
def test_bench_prints_a_table_for_people(shardwright: Shardwright, tiny_llama: Path) -> None:
    result = shardwright("bench", "all", str(tiny_llama), *CACHE, "--repeat", "1")
    assert result.code == 0
    assert "GFLOP/s" in result.stdout
    assert "decode-32" in result.stdout
    assert "start: ready after" in result.stdout
