"""Requests of all kinds come, run, are aborted and lose their ranks, with tokens guessed ahead, with batches that run
ahead of results, and without: no block or row is lost or owned twice, nobody starves, and everyone gets their tokens.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.engine.fake_ranks import VOCAB_SIZE, FakeRanks, guess, next_token

from shardwright.cache.spec import CacheGroup, Visibility, VisibilityKind, blocks_for_sequence
from shardwright.config import SpeculativeConfig
from shardwright.engine.limits import SchedulerLimits
from shardwright.engine.messages import EngineRequest
from shardwright.engine.prompt_lookup import PromptLookup
from shardwright.engine.request import Guesses, Request
from shardwright.engine.scheduler import Scheduler
from shardwright.engine.speculation import Speculation
from shardwright.sampling_params import SamplingParams

FULL = CacheGroup(Visibility(), (0, 1))
SLIDING = CacheGroup(Visibility(VisibilityKind.SLIDING, 8), (2, 3))
MAX_MODEL_LEN = 40
STOPS = list(range(0, VOCAB_SIZE, 9))
SPECULATIVE = {
    "none": None,
    "ngram": SpeculativeConfig(speculative_method="ngram", num_speculative_tokens=5),
    "draft": SpeculativeConfig(speculative_model="small", num_speculative_tokens=5),
}


class Oracle(PromptLookup):
    """Finds what follows, with mistakes."""

    def propose(self, token_ids: list[int], most: int) -> list[int]:
        return guess(token_ids, most)


class OracleSpeculation(Speculation):
    """Looks for proposals where there are some."""

    def _guesses(self, request: Request) -> Guesses:
        guesses = super()._guesses(request)
        if not self.drafts:
            guesses.lookup = Oracle(longest=1, shortest=1)
        return guesses


class SchedulerMachine(RuleBasedStateMachine):
    """A scheduler with the ranks it schedules for."""

    runs_ahead = False

    @initialize(
        groups=st.sampled_from([[FULL], [SLIDING], [FULL, SLIDING]]),
        spare_blocks=st.integers(0, 8),
        budget=st.integers(4, 24),
        max_in_flight=st.integers(1, 3),
        prefix=st.booleans(),
        priority=st.booleans(),
        method=st.sampled_from(sorted(SPECULATIVE)),
        step_tokens=st.integers(2, 24),
    )
    def start(
        self,
        groups: list[CacheGroup],
        spare_blocks: int,
        budget: int,
        max_in_flight: int,
        prefix: bool,
        priority: bool,
        method: str,
        step_tokens: int,
    ) -> None:
        config = None if self.runs_ahead else SPECULATIVE[method]
        least = blocks_for_sequence(groups, num_tokens=MAX_MODEL_LEN, chunk=budget, block_size=4)
        limits = SchedulerLimits(
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            block_size=4,
            num_blocks=least + spare_blocks,
            max_in_flight=2 if self.runs_ahead else max_in_flight,
            runs_ahead=self.runs_ahead,
            enable_prefix_caching=prefix,
            by_priority=priority,
        )
        speculation = None
        if config is not None:
            speculation = OracleSpeculation(config, step_tokens=min(step_tokens, budget), max_model_len=MAX_MODEL_LEN)
        self.scheduler = Scheduler(limits, groups, speculation)
        self.ranks = FakeRanks(groups, limits)
        self.wanted: dict[str, list[int]] = {}
        """Tokens still to come, by request."""
        self.count = 0

    @rule(
        length=st.integers(1, MAX_MODEL_LEN - 1),
        max_tokens=st.integers(1, 30),
        family=st.integers(0, 1),
        priority=st.integers(-1, 1),
        stops=st.booleans(),
        min_tokens=st.integers(0, 8),
    )
    def add(self, length: int, max_tokens: int, family: int, priority: int, stops: bool, min_tokens: int) -> None:
        self.count += 1
        name, prompt = str(self.count), [1000 * family + i for i in range(length)]
        min_tokens = min(min_tokens, max_tokens)
        params = SamplingParams(
            max_tokens=max_tokens, min_tokens=min_tokens, temperature=0, stop_token_ids=STOPS if stops else None
        )
        self.scheduler.add(
            EngineRequest(request_id=name, prompt_token_ids=prompt, sampling_params=params, priority=priority)
        )
        tokens = list(prompt)
        for _ in range(min(max_tokens, MAX_MODEL_LEN - length)):
            tokens.append(next_token(tokens))
            if stops and len(tokens) - length >= min_tokens and tokens[-1] in STOPS:
                break
        self.wanted[name] = tokens[length:]

    @rule(data=st.data())
    @precondition(lambda self: self.wanted)
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.wanted)))
        assert self.scheduler.abort(name)
        del self.wanted[name]

    @rule()
    def submit(self) -> None:
        if len(self.scheduler.in_flight) == self.ranks.max_in_flight:
            return
        batch = self.scheduler.schedule()
        assert batch.total_tokens <= self.scheduler.limits.max_num_batched_tokens
        assert len(batch.rows) == len(set(batch.rows)) <= self.scheduler.limits.max_num_seqs
        assert all(count > 0 for count in batch.num_tokens)
        is_stuck = not batch.rows and not self.scheduler.in_flight
        assert not is_stuck or not self.scheduler.num_unfinished, "work is there but nothing runs"
        if batch.rows:
            self.ranks.submit(batch)

    @rule()
    def submit_in_vain(self) -> None:
        if len(self.scheduler.in_flight) < self.ranks.max_in_flight:
            batch = self.scheduler.schedule()
            if batch.rows:
                self.scheduler.take_back()

    @rule()
    def fail(self) -> None:
        if self.ranks.runs_ahead:
            self.ranks.fail()
            while self.scheduler.in_flight:
                self.scheduler.take_back()

    @rule()
    def collect(self) -> None:
        if not self.scheduler.in_flight:
            return
        for output in self.scheduler.update(self.ranks.collect()):
            expected = [self.wanted[output.request_id].pop(0) for _ in output.new_token_ids]
            assert output.new_token_ids == expected
            if output.finish_reason is not None:
                assert self.wanted.pop(output.request_id) == []

    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for _ in range(self.ranks.max_in_flight):
                self.submit()
            self.collect()

    @rule()
    def lose_ranks(self) -> None:
        self.ranks.restart()
        self.scheduler.start_over()

    @rule()
    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()

    @invariant()
    def is_consistent(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            for _ in range(3000):
                if not self.scheduler.num_unfinished and not self.scheduler.in_flight:
                    break
                self.step(1)
            assert not self.wanted, "requests starve"
            assert self.scheduler.stats().num_free_blocks == self.scheduler.limits.num_blocks


class AheadMachine(SchedulerMachine):
    """Batches are planned before it is known what those before them sample."""

    runs_ahead = True


for machine in (SchedulerMachine, AheadMachine):
    machine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
TestAheadMachine = AheadMachine.TestCase
