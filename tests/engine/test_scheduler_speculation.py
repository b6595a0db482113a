"""Tokens guessed ahead, as the scheduler plans them: what comes true, what does not, and what they may not cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.engine.fake_ranks import FakeRanks, guess, next_token

from shardwright.cache.spec import CacheGroup, Visibility, VisibilityKind
from shardwright.config import SpeculativeConfig
from shardwright.engine.limits import SchedulerLimits
from shardwright.engine.messages import EngineOutput, EngineRequest
from shardwright.engine.prompt_lookup import PromptLookup
from shardwright.engine.request import Guesses, Request
from shardwright.engine.scheduler import Scheduler
from shardwright.engine.speculation import Speculation
from shardwright.outputs import FinishReason
from shardwright.sampling_params import SamplingParams
from shardwright.worker.batch import Batch, StepResult

FULL = CacheGroup(Visibility(), (0, 1))
SLIDING = CacheGroup(Visibility(VisibilityKind.SLIDING, 8), (2, 3))
PROMPT = [1, 2, 3, 4, 5]


def following(tokens: list[int], count: int) -> list[int]:
    """What really follows."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[-count:]


def wrong(tokens: list[int], count: int) -> list[int]:
    return [token + 1 for token in following(tokens, count)]


def joined(steps: list[list[int]]) -> list[int]:
    return [token for step in steps for token in step]


class Engine:
    """A scheduler whose guesses a function makes, and the ranks that it schedules for."""

    def __init__(
        self,
        propose: Callable[[list[int], int], list[int]] | None = following,
        groups: list[CacheGroup] | None = None,
        *,
        step_tokens: int = 16,
        **limits: object,
    ) -> None:
        defaults: dict[str, object] = {
            "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "block_size": 4, "num_blocks": 64,
        }  # fmt: skip
        self.limits = SchedulerLimits(**(defaults | limits))  # type: ignore[arg-type]

        class Lookup(PromptLookup):
            def propose(self, token_ids: list[int], most: int) -> list[int]:
                assert propose is not None
                return propose(token_ids, most)

        class Guessing(Speculation):
            def _guesses(self, request: Request) -> Guesses:
                guesses = super()._guesses(request)
                guesses.lookup = None if propose is None else Lookup(longest=1, shortest=1)
                return guesses

        config = SpeculativeConfig(
            speculative_method="draft" if propose is None else "ngram",
            speculative_model="small" if propose is None else None,
        )
        speculation = Guessing(config, step_tokens=step_tokens, max_model_len=self.limits.max_model_len)
        self.scheduler = Scheduler(self.limits, groups or [FULL], speculation)
        self._ranks = FakeRanks(self.scheduler.memory.groups, self.limits)

    def add(self, prompt: list[int] = PROMPT, *, request_id: str = "a", **params: object) -> None:
        wanted = SamplingParams(**({"temperature": 0, "max_tokens": 12} | params))  # type: ignore[arg-type]
        self.scheduler.add(EngineRequest(request_id=request_id, prompt_token_ids=list(prompt), sampling_params=wanted))

    def step(self) -> tuple[Batch, list[EngineOutput]]:
        batch = self.scheduler.schedule()
        self._ranks.submit(batch)
        outputs = self.scheduler.update(self._ranks.collect())
        self.scheduler.check_integrity()
        return batch, outputs

    def run(self) -> dict[str, list[list[int]]]:
        """New tokens of each step, by request."""
        tokens: dict[str, list[list[int]]] = {}
        while self.scheduler.num_unfinished:
            for output in self.step()[1]:
                tokens.setdefault(output.request_id, []).append(output.new_token_ids)
        return tokens


def test_right_guesses_come_with_the_token_after_them() -> None:
    engine = Engine()
    engine.add()
    assert list(map(len, engine.run()["a"])) == [1, 5, 5, 1]
    stats = engine.scheduler.stats()
    assert (stats.num_proposed_tokens, stats.num_accepted_tokens) == (8, 8)
    assert stats.num_generated_tokens == 12


def test_a_wrong_guess_costs_its_place_only() -> None:
    engine = Engine(wrong)
    engine.add()
    engine.step()
    batch, (output,) = engine.step()
    assert (batch.num_computed, batch.num_tokens) == ([5], [5])
    assert batch.proposed == {0: wrong([*PROMPT, next_token(PROMPT)], 4)}
    assert output.new_token_ids == following(PROMPT, 2)[1:]
    assert (output.num_proposed_tokens, output.num_accepted_tokens) == (4, 0)
    batch, _ = engine.step()
    assert (batch.num_computed, batch.num_tokens) == ([6], [3])
    assert joined(engine.run()["a"]) == following(PROMPT, 12)[3:]


def test_guesses_are_right_up_to_the_first_that_is_wrong() -> None:
    def mixed(tokens: list[int], count: int) -> list[int]:
        right = following(tokens, count)
        return [*right[:2], right[2] + 1, *right[3:]] if count > 2 else right

    engine = Engine(mixed)
    engine.add(max_tokens=8)
    steps = engine.run()["a"]
    assert list(map(len, steps))[:2] == [1, 3]
    assert joined(steps) == following(PROMPT, 8)


@pytest.mark.parametrize("place", range(1, 5))
def test_a_stop_token_among_right_guesses_ends_the_request(place: int) -> None:
    engine = Engine()
    tokens = following(PROMPT, 8)
    engine.add(stop_token_ids=[tokens[place]])
    engine.step()
    _, (output,) = engine.step()
    assert output.new_token_ids == tokens[1 : place + 1]
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, tokens[place])
    assert engine.scheduler.stats().num_free_blocks == 64


def test_a_stop_token_before_min_tokens_ends_nothing() -> None:
    engine = Engine()
    tokens = following(PROMPT, 8)
    engine.add(stop_token_ids=tokens[2:4], min_tokens=4)
    assert joined(engine.run()["a"]) == tokens[:4]


def test_no_place_is_left_for_wrong_guesses_in_blocks() -> None:
    """With as many wrong guesses as there may be, a sequence holds what it would hold with a guess or two."""
    engine = Engine(wrong, max_model_len=24, num_blocks=6)
    engine.add(max_tokens=19)
    assert joined(engine.run()["a"]) == following(PROMPT, 19)
    assert engine.scheduler.stats().num_preemptions == 0


def test_many_decodes_guess_nothing() -> None:
    engine = Engine(step_tokens=6)
    for number in range(4):
        engine.add([*PROMPT, number], request_id=str(number))
    engine.step()
    engine.step()
    batch, _ = engine.step()
    assert batch.num_tokens == [1] * 4
    assert not batch.proposed


def test_guesses_leave_budget_for_every_decode() -> None:
    engine = Engine(step_tokens=6, max_num_batched_tokens=6)
    for number in range(3):
        engine.add([number, 50, 60], request_id=str(number), max_tokens=6)
    assert {name: joined(steps) for name, steps in engine.run().items()} == {
        str(number): following([number, 50, 60], 6) for number in range(3)
    }


def test_only_what_came_true_is_found_again() -> None:
    engine = Engine(wrong)
    engine.add(max_tokens=3)
    tokens = joined(engine.run()["a"])
    guessed = wrong([*PROMPT, tokens[0]], 4)
    engine.add([*PROMPT, tokens[0], *guessed, 9, 9], request_id="b")
    assert engine.step()[0].num_computed == [4]
    engine.scheduler.abort("b")
    engine.add([*PROMPT, *tokens, 9, 9], request_id="c")
    assert engine.step()[0].num_computed == [4]


def test_accepted_tokens_are_found_again() -> None:
    engine = Engine()
    engine.add(max_tokens=8)
    tokens = joined(engine.run()["a"])
    engine.add([*PROMPT, *tokens], request_id="b")
    assert engine.step()[0].num_computed == [8]


def test_no_decode_lacks_a_block_for_the_guesses_of_another() -> None:
    engine = Engine(num_blocks=5, max_model_len=16, enable_prefix_caching=False)
    for number in range(2):
        engine.add([number, 50, 60, 70, 80], request_id=str(number), max_tokens=8)
    engine.step()
    batch, _ = engine.step()
    assert batch.num_tokens == [5, 1]  # the second would need a sixth block
    assert engine.scheduler.stats().num_preemptions == 0


def test_a_window_moves_by_what_came_true() -> None:
    for propose in (following, wrong):
        engine = Engine(propose, [SLIDING, FULL])
        engine.add(max_tokens=40)
        assert joined(engine.run()["a"]) == following(PROMPT, 40)


def test_the_draft_model_is_asked_for_the_next_step_and_gets_blocks_for_it() -> None:
    engine = Engine(None)
    engine.add(PROMPT[:4])
    batch, _ = engine.step()
    assert batch.num_to_propose == {0: 4}
    assert [update.blocks for update in batch.table_updates] == [[1], [2]]
    batch, _ = engine.step()
    assert batch.proposed == {0: guess([*PROMPT[:4], next_token(PROMPT[:4])], 4)}


def test_the_draft_model_is_not_asked_where_blocks_are_short() -> None:
    engine = Engine(None, num_blocks=3, max_model_len=12)
    engine.add(PROMPT[:3])
    engine.add(PROMPT[2:], request_id="b")
    batch, _ = engine.step()
    assert batch.num_tokens == [3, 3]
    assert batch.num_to_propose == {0: 4}


def test_a_batch_that_reached_nobody_leaves_no_guess_behind() -> None:
    engine = Engine(None)
    engine.add()
    engine.step()
    engine.scheduler.schedule()
    engine.scheduler.take_back()
    engine.scheduler.check_integrity()
    batch, _ = engine.step()
    assert (batch.num_computed, batch.num_tokens) == ([0], [6])
    assert not batch.proposed
    assert joined(engine.run()["a"]) == following(PROMPT, 12)[2:]


@pytest.mark.parametrize("num_accepted", [0, 2])
def test_guesses_that_spoil_logits_cost_a_request_its_guesses_only(num_accepted: int) -> None:
    engine = Engine()
    engine.add()
    engine.step()
    batch = engine.scheduler.schedule()
    outputs = engine.scheduler.update(
        StepResult(token_ids=[None], logprobs={}, prompt_logprobs={}, errors={0: "NaN"}, num_accepted={0: num_accepted})
    )
    tokens = following(PROMPT, 12)
    assert [output.new_token_ids for output in outputs] == ([tokens[1 : 1 + num_accepted]] if num_accepted else [])
    again = engine.scheduler.schedule()
    assert (again.num_computed, again.num_tokens) == ([batch.num_computed[0] + num_accepted], [1])
    assert again.spoiled_rows == batch.rows
    assert not again.proposed
    engine.scheduler.update(StepResult(token_ids=[tokens[1 + num_accepted]], logprobs={}, prompt_logprobs={}))
    engine.scheduler.check_integrity()
    assert not engine.scheduler.schedule().proposed


def test_what_is_spoiled_without_guesses_ends_the_request() -> None:
    engine = Engine(wrong, step_tokens=1)
    engine.add()
    engine.step()
    engine.scheduler.schedule()
    (output,) = engine.scheduler.update(StepResult(token_ids=[3], logprobs={}, prompt_logprobs={}, errors={0: "NaN"}))
    assert output.finish_reason is FinishReason.ABORT
