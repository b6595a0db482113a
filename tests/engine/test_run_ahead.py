"""Batches that are planned before it is known what those before them sample: the same tokens, and little in vain."""

from __future__ import annotations

import pytest
from tests.engine.fake_ranks import FakeRanks, next_token

from shardwright.cache.spec import CacheGroup, Visibility
from shardwright.config import EngineConfig
from shardwright.engine.core import EngineCore
from shardwright.engine.limits import SchedulerLimits
from shardwright.engine.messages import EngineRequest
from shardwright.errors import StepFailedError
from shardwright.sampling_params import SamplingParams
from shardwright.worker.batch import Batch, StepResult

LIMITS = SchedulerLimits(
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=32,
    block_size=4,
    num_blocks=40,
    max_in_flight=2,
    runs_ahead=True,
)


class Watched(FakeRanks):
    """Keeps the batches that it got; the result of `failing`, counted from 0, is an error, once."""

    failing = -1

    def __init__(self) -> None:
        super().__init__([CacheGroup(Visibility(), (0, 1))], LIMITS)
        self.batches: list[Batch] = []
        self.num_collected = 0

    def submit(self, batch: Batch) -> None:
        super().submit(batch)
        self.batches.append(batch)

    def collect(self) -> StepResult:
        self.num_collected += 1
        if self.num_collected - 1 == self.failing:
            self.fail()
            raise StepFailedError(MemoryError("too large"))
        return super().collect()


@pytest.fixture
def ranks() -> Watched:
    return Watched()


@pytest.fixture
def core(ranks: Watched) -> EngineCore:
    return EngineCore(EngineConfig.from_options("fake"), ranks)


def ask(core: EngineCore, *prompts: list[int], **params: object) -> None:
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0, **params)  # type: ignore[arg-type]
        core.add(EngineRequest(request_id=str(number), prompt_token_ids=prompt, sampling_params=sampling))


def finish(core: EngineCore) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for _ in range(200):
        if not core.has_work:
            break
        for output in core.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
        core.scheduler.check_integrity()
    assert core.stats.num_free_blocks == core.stats.num_blocks
    return tokens


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def test_a_step_is_planned_while_the_one_before_is_not_done(core: EngineCore, ranks: Watched) -> None:
    ask(core, [1, 2, 3], [4, 5], max_tokens=5)
    core.step()
    assert [batch.num_computed for batch in ranks.batches] == [[0, 0], [3, 2]]
    assert [batch.num_tokens for batch in ranks.batches] == [[3, 2], [1, 1]]
    core.step()
    assert (ranks.batches[2].num_computed, ranks.num_collected) == ([4, 3], 2)
    assert finish(core)["0"] == expected([1, 2, 3], 5)[2:]


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_nothing_is_computed_behind_the_last_token_that_is_allowed(
    core: EngineCore, ranks: Watched, max_tokens: int
) -> None:
    ask(core, [1, 2, 3], max_tokens=max_tokens)
    assert finish(core) == {"0": expected([1, 2, 3], max_tokens)}
    assert len(ranks.batches) == max_tokens


def test_nothing_is_computed_behind_the_longest_sequence(core: EngineCore, ranks: Watched) -> None:
    prompt = list(range(29))
    ask(core, prompt, max_tokens=20)
    assert finish(core) == {"0": expected(prompt, LIMITS.max_model_len - 29)}
    assert sum(batch.total_tokens for batch in ranks.batches) == LIMITS.max_model_len - 1


def test_what_was_computed_behind_a_token_that_ends_a_sequence_is_thrown_away(core: EngineCore, ranks: Watched) -> None:
    tokens = expected([1, 2, 3], 3)
    ask(core, [1, 2, 3], [9], max_tokens=9, stop_token_ids=tokens[2:])
    assert finish(core) == {"0": tokens, "1": expected([9], 9)}
    assert [batch.num_computed[0] for batch in ranks.batches if len(batch.rows) == 2] == [0, 3, 4, 5]
    assert core.stats.num_generated_tokens == 12


def test_a_step_that_fails_takes_the_next_one_with_it_and_both_are_done_again(core: EngineCore, ranks: Watched) -> None:
    ranks.failing = 2
    ask(core, [1, 2, 3], [4, 5], max_tokens=6)
    first = core.step(), core.step()
    with pytest.raises(MemoryError, match="too large"):
        core.step()
    core.scheduler.check_integrity()
    assert not core.scheduler.in_flight
    got = {output.request_id: output.new_token_ids for output in first[0].outputs}
    for output in first[1].outputs:
        got[output.request_id] = [*got[output.request_id], *output.new_token_ids]
    rest = finish(core)
    assert {name: got[name] + rest[name] for name in got} == {"0": expected([1, 2, 3], 6), "1": expected([4, 5], 6)}


def test_a_request_that_is_aborted_before_a_step_fails_is_gone(core: EngineCore, ranks: Watched) -> None:
    ranks.failing = 1
    ask(core, [1, 2, 3], [4, 5], max_tokens=6)
    core.step()
    assert core.abort("0")
    with pytest.raises(MemoryError):
        core.step()
    core.scheduler.check_integrity()
    assert list(finish(core)) == ["1"]
