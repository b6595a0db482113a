from __future__ import annotations

import logging

import msgspec
import pytest
from tests.server.fake_engine import INFO

from shardwright.config import CPU_STEP_TOKENS, GPU_STEP_TOKENS, EngineConfig, SpeculativeConfig
from shardwright.engine.in_flight import ScheduledTokens
from shardwright.engine.messages import EngineInfo, EngineRequest
from shardwright.engine.request import Request
from shardwright.engine.speculation import Speculation, open_speculation
from shardwright.errors import ConfigError
from shardwright.sampling_params import SamplingParams
from shardwright.worker.batch import StepResult

ENGINE: EngineInfo = msgspec.structs.replace(INFO, max_num_batched_tokens=2048)


def make_speculation(*, step_tokens: int = 16, max_model_len: int = 64, **options: object) -> Speculation:
    config = SpeculativeConfig(**({"speculative_method": "ngram"} | options))  # type: ignore[arg-type]
    return Speculation(config, step_tokens=step_tokens, max_model_len=max_model_len)


def make_request(tokens: list[int], *, max_tokens: int | None = 20) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(EngineRequest(request_id="a", prompt_token_ids=tokens, sampling_params=params), (0, 1))


def take(
    speculation: Speculation, request: Request, *, proposed: int = 0, accepted: int = 0, drafted: tuple[int, ...] = ()
) -> None:
    """A step brings a token after so many accepted ones."""
    part = ScheduledTokens(request, 0, 1 + proposed, [0] * proposed)
    result = StepResult(
        token_ids=[9], logprobs={}, prompt_logprobs={}, num_accepted={0: accepted}, proposals={0: list(drafted)}
    )
    speculation.take(part, 0, result)


def test_decodes_share_what_a_step_takes_and_many_guess_nothing() -> None:
    speculation = make_speculation(step_tokens=12)
    assert [speculation.most(count) for count in (1, 2, 3, 4, 6, 7, 64)] == [11, 5, 3, 2, 1, 0, 0]


def test_no_more_is_guessed_than_the_request_may_get() -> None:
    speculation, repeated = make_speculation(), [1, 2, 3, 4, 5, 6] * 2
    assert speculation.propose(make_request(repeated), 16) == [1, 2, 3, 4]
    assert speculation.propose(make_request(repeated), 2) == [1, 2]
    assert speculation.propose(make_request(repeated, max_tokens=3), 16) == [1, 2]
    assert speculation.propose(make_request(repeated, max_tokens=1), 16) == []
    assert make_speculation(max_model_len=14).propose(make_request(repeated, max_tokens=None), 16) == [1]
    assert make_speculation(max_model_len=13).propose(make_request(repeated, max_tokens=None), 16) == []


def test_wrong_guesses_bring_fewer() -> None:
    speculation, request = make_speculation(), make_request([1, 2, 3, 4, 5, 6] * 2)
    take(speculation, request, proposed=4, accepted=0)
    assert speculation.propose(request, 16) == [1, 2]
    assert (speculation.num_proposed, speculation.num_accepted) == (4, 0)


def test_drafted_tokens_are_those_of_the_last_step_only() -> None:
    speculation = make_speculation(speculative_method="none", speculative_model="small")
    request = make_request([1, 2, 1, 2])
    assert speculation.drafts
    assert speculation.propose(request, 16) == []
    assert speculation.num_to_draft(request, 16, num_proposed=0) == 4
    take(speculation, request, drafted=(7, 8, 9))
    assert speculation.propose(request, 2) == [7, 8]
    take(speculation, request, proposed=2, accepted=2)
    assert speculation.propose(request, 16) == []


def test_the_draft_model_is_not_asked_for_what_can_not_be_used() -> None:
    speculation = make_speculation(speculative_model="small", speculative_method="draft", max_model_len=10)
    counts = [speculation.num_to_draft(make_request([1] * n), 16, num_proposed=0) for n in (2, 5, 6, 7, 8, 9)]
    assert counts == [4, 3, 2, 1, 0, 0]
    assert speculation.num_to_draft(make_request([1, 2], max_tokens=3), 16, num_proposed=0) == 1


def test_the_device_says_how_many_tokens_are_free() -> None:
    ngram = SpeculativeConfig(speculative_method="ngram")
    for device, expected in (("cpu", CPU_STEP_TOKENS), ("cuda", GPU_STEP_TOKENS)):
        found = open_speculation(ngram, msgspec.structs.replace(ENGINE, device=device))
        assert found is not None
        assert found.most(1) == expected - 1
    found = open_speculation(ngram, msgspec.structs.replace(ENGINE, max_num_batched_tokens=3))
    assert found is not None
    assert found.most(1) == 2


def test_what_can_not_be_taken_back_is_not_guessed_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    info = msgspec.structs.replace(ENGINE, can_rewind=False, attention_rung="state")
    with caplog.at_level(logging.WARNING):
        assert open_speculation(SpeculativeConfig(), info) is None
        assert not caplog.records
        assert open_speculation(SpeculativeConfig(speculative_model="small"), info) is None
    (record,) = caplog.records
    assert "on rung 'state' what a wrong guess leaves behind cannot be taken back" in record.message


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"speculative_method": "magic"}, "must be one of"),
        ({"speculative_method": "draft"}, "name one with --speculative-model"),
        ({"speculative_method": "ngram", "speculative_model": "small"}, "give one of the two"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min is 5, more than prompt_lookup_max, which is 4"),
        ({"num_speculative_tokens": 0}, "must be a whole number of at least 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        EngineConfig.from_options("m", **options)


def test_a_draft_model_is_made_from_its_own_files_on_one_rank() -> None:
    config = EngineConfig.from_options(
        "m", tokenizer="t", weights="w", max_model_len=9, dtype="float32", tensor_parallel_size=2, speculative_model="s"
    )
    own = config.of_draft
    assert config.speculative.method == "draft"
    assert (own.model.model, own.model.tokenizer, own.model.weights, own.model.max_model_len) == ("s", None, None, None)
    assert (own.model.dtype, own.parallel.num_ranks) == ("float32", 1)
