from __future__ import annotations

import pytest

from shardwright.bench.workloads import ALL, WORKLOADS, choose, prompt_token_ids
from shardwright.errors import UsageError


@pytest.mark.parametrize(
    ("name", "requests", "prompt_tokens", "output_tokens"),
    [
        ("decode-1", 1, 32, 128),
        ("decode-8", 8, 8 * 32, 8 * 128),
        ("decode-32", 32, 32 * 32, 32 * 128),
        ("mixed-32", 32, 32 * 128, 32 * 64),
        ("prefill", 4, 4 * 1024, 4),
        ("shared-prefix", 16, 16 * 1056, 16 * 32),
    ],
)
def test_the_standard_workloads_have_their_sizes(
    name: str, requests: int, prompt_tokens: int, output_tokens: int
) -> None:
    workload = WORKLOADS[name]
    assert (len(workload.prompts), workload.num_prompt_tokens, workload.num_output_tokens) == (
        requests,
        prompt_tokens,
        output_tokens,
    )


def test_token_ids_follow_the_rule_that_other_engines_are_given_too() -> None:
    assert prompt_token_ids(0, 3) == [100, 113, 126]
    assert prompt_token_ids(3, 2) == [121, 134]
    assert WORKLOADS["decode-8"].prompts[3][:2] == [121, 134]


def test_shared_prefix_shares_its_prefix_and_nothing_more() -> None:
    workload = WORKLOADS["shared-prefix"]
    assert len({tuple(prompt[: workload.common_tokens]) for prompt in workload.prompts}) == 1
    assert len({tuple(prompt[workload.common_tokens :]) for prompt in workload.prompts}) == 16


def test_ids_are_folded_into_a_small_vocabulary_only() -> None:
    workload = WORKLOADS["decode-8"]
    assert workload.for_vocabulary(49152) is workload
    assert max(max(prompt) for prompt in workload.for_vocabulary(128).prompts) < 128


def test_an_unknown_workload_is_refused_with_the_known_ones() -> None:
    assert [workload.name for workload in choose(ALL)] == list(WORKLOADS)
    with pytest.raises(UsageError, match="choose from decode-1"):
        choose(["decode-2"])
