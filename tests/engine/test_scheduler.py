"""The scheduler: budgets, order, preemption, prefix hits; and that nothing is lost whatever happens."""

from __future__ import annotations

import pytest
from tests.engine.fake_ranks import FakeRank

from shardwright.cache.spec import CacheGroup, Visibility, VisibilityKind, blocks_for_sequence
from shardwright.engine.limits import SchedulerLimits
from shardwright.engine.messages import EngineOutput, EngineRequest
from shardwright.engine.scheduler import Scheduler
from shardwright.outputs import FinishReason
from shardwright.sampling_params import SamplingParams
from shardwright.worker.batch import Batch, StepResult

FULL = CacheGroup(Visibility(), (0, 1))
SLIDING = CacheGroup(Visibility(VisibilityKind.SLIDING, 8), (2, 3))


def make_scheduler(groups: list[CacheGroup] | None = None, **limits: object) -> Scheduler:
    defaults: dict[str, object] = {
        "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "block_size": 4, "num_blocks": 64,
    }  # fmt: skip
    return Scheduler(SchedulerLimits(**(defaults | limits)), groups or [FULL])  # type: ignore[arg-type]


def make_request(
    request_id: str, length: int, *, max_tokens: int = 4, first: int = 0, priority: int = 0, eos: tuple[int, ...] = ()
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=[first + i for i in range(length)],
        sampling_params=SamplingParams(max_tokens=max_tokens, temperature=0),
        eos_token_ids=list(eos),
        priority=priority,
    )


class Worker:
    """Samples token 7 wherever a batch completes what is known of a row, and checks what it is told."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        groups, block_size = scheduler.memory.groups, scheduler.limits.block_size
        self._rank = FakeRank(groups, block_size=block_size, sample=lambda tokens: 7)

    def step(self) -> tuple[Batch, list[EngineOutput]]:
        batch = self.scheduler.schedule()
        return batch, self.scheduler.update(self.execute(batch)) if batch.rows else []

    def execute(self, batch: Batch) -> StepResult:
        return self._rank.execute(batch)

    def run(self, max_steps: int = 500) -> dict[str, list[EngineOutput]]:
        """Step until all requests are done; outputs by request."""
        outputs: dict[str, list[EngineOutput]] = {}
        for _ in range(max_steps):
            if not self.scheduler.num_unfinished:
                return outputs
            for output in self.step()[1]:
                outputs.setdefault(output.request_id, []).append(output)
            self.scheduler.check_integrity()
        raise AssertionError("requests starve")


def test_a_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    worker = Worker(scheduler := make_scheduler())
    scheduler.add(make_request("a", 40))
    counts = [worker.step()[0].num_tokens for _ in range(4)]
    assert counts == [[16], [16], [8], [1]]


def test_decodes_go_on_beside_a_long_prompt() -> None:
    worker = Worker(scheduler := make_scheduler())
    scheduler.add(make_request("decode", 3, max_tokens=8))
    worker.step()
    scheduler.add(make_request("prompt", 40))
    for _ in range(3):
        batch, outputs = worker.step()
        assert batch.num_tokens[0] == 1
        assert batch.total_tokens <= 16
        assert "decode" in {output.request_id for output in outputs}


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole() -> None:
    worker = Worker(scheduler := make_scheduler(enable_chunked_prefill=False))
    scheduler.add(make_request("a", 10))
    scheduler.add(make_request("b", 10, first=100))
    assert worker.step()[0].num_tokens == [10]
    assert worker.step()[0].num_tokens == [1, 10]


def test_requests_run_first_come_first_served() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    worker = Worker(scheduler)
    for name in ("a", "b", "c"):
        scheduler.add(make_request(name, 3, max_tokens=1))
    assert [worker.step()[1][0].request_id for _ in range(3)] == ["a", "b", "c"]


def test_lower_priority_numbers_run_first() -> None:
    scheduler = make_scheduler(max_num_seqs=1, by_priority=True)
    worker = Worker(scheduler)
    for name, priority in (("a", 5), ("b", -1), ("c", 5)):
        scheduler.add(make_request(name, 3, max_tokens=1, priority=priority))
    assert [worker.step()[1][0].request_id for _ in range(3)] == ["b", "a", "c"]


def test_out_of_blocks_the_latest_request_is_preempted_and_still_ends() -> None:
    scheduler = make_scheduler(num_blocks=16, enable_prefix_caching=False)
    worker = Worker(scheduler)
    for index in range(4):
        scheduler.add(make_request(str(index), 12, max_tokens=30, first=100 * index))
    outputs = worker.run()
    assert scheduler.stats().num_preemptions > 0
    assert {name: sum(len(o.new_token_ids) for o in got) for name, got in outputs.items()} == dict.fromkeys("0123", 30)
    assert scheduler.stats().num_free_blocks == 16


def test_equal_prompts_share_blocks_even_in_the_step_that_computes_them() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    worker = Worker(scheduler)
    for name in "abc":
        scheduler.add(make_request(name, 18))
    batch, _ = worker.step()
    assert batch.num_computed == [0, 16, 16]
    assert batch.num_tokens == [18, 2, 2]
    assert scheduler.stats().num_prefix_hit_tokens == 32


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    worker = Worker(scheduler := make_scheduler())
    scheduler.add(make_request("a", 16, max_tokens=1))
    worker.run()
    scheduler.add(make_request("b", 16, max_tokens=1))
    batch, outputs = worker.step()
    assert (batch.num_computed, batch.num_tokens) == ([12], [4])
    assert outputs[0].num_cached_tokens == 12


def test_prompt_logprobs_leave_the_prefix_cache_aside() -> None:
    worker = Worker(scheduler := make_scheduler())
    scheduler.add(make_request("a", 16, max_tokens=1))
    worker.run()
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    scheduler.add(EngineRequest(request_id="b", prompt_token_ids=list(range(16)), sampling_params=params))
    assert worker.step()[0].num_computed == [0]


def test_blocks_out_of_the_window_are_given_back() -> None:
    scheduler = make_scheduler([SLIDING], max_model_len=60, enable_prefix_caching=False)
    worker = Worker(scheduler)
    scheduler.add(make_request("a", 40, max_tokens=10))
    for _ in range(6):
        worker.step()
    held = scheduler.limits.num_blocks - scheduler.stats().num_free_blocks
    assert held <= blocks_for_sequence([SLIDING], num_tokens=60, chunk=16, block_size=4)
    assert held < 40 // 4


def test_a_prefix_is_found_by_its_window_where_a_group_has_one() -> None:
    worker = Worker(scheduler := make_scheduler([FULL, SLIDING], num_blocks=80))
    scheduler.add(make_request("a", 40, max_tokens=1))
    worker.run()
    scheduler.add(make_request("b", 40, max_tokens=1))
    assert worker.step()[0].num_computed == [36]


def test_end_of_sequence_ends_a_request() -> None:
    worker = Worker(scheduler := make_scheduler())
    scheduler.add(make_request("a", 3, eos=(7,)))
    (output,) = worker.run()["a"]
    assert output.finish_reason is FinishReason.STOP
    assert output.stop_reason is None


def test_a_request_ends_at_the_models_length() -> None:
    worker = Worker(scheduler := make_scheduler(max_model_len=8))
    scheduler.add(make_request("a", 5, max_tokens=100))
    outputs = worker.run()["a"]
    assert sum(len(output.new_token_ids) for output in outputs) == 3
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_abort_frees_blocks_of_running_and_waiting_requests() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    worker = Worker(scheduler)
    scheduler.add(make_request("a", 20))
    scheduler.add(make_request("b", 20))
    worker.step()
    assert scheduler.abort("a")
    assert scheduler.abort("b")
    assert not scheduler.abort("a")
    assert scheduler.stats().num_free_blocks == scheduler.limits.num_blocks
    scheduler.check_integrity()


def test_an_aborted_step_does_not_bring_a_request_back() -> None:
    scheduler = make_scheduler()
    worker = Worker(scheduler)
    scheduler.add(make_request("a", 3))
    result = worker.execute(scheduler.schedule())
    scheduler.abort("a")
    assert scheduler.update(result) == []
    scheduler.check_integrity()


def test_an_id_in_use_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3))
    with pytest.raises(ValueError, match="'a' is in use"):
        scheduler.add(make_request("a", 3))


def test_a_request_whose_logits_are_not_numbers_ends_and_leaves_no_prefix_behind() -> None:
    scheduler = make_scheduler()
    worker = Worker(scheduler)
    scheduler.add(make_request("a", 9))
    result = worker.execute(scheduler.schedule())
    (output,) = scheduler.update(
        StepResult(token_ids=result.token_ids, logprobs={}, prompt_logprobs={}, errors={0: "NaN"})
    )
    assert output.finish_reason is FinishReason.ABORT
    scheduler.add(make_request("b", 9))
    batch = scheduler.schedule()
    assert batch.num_computed == [0]
    assert batch.spoiled_rows == [0]  # for the ranks that did not see it
    scheduler.update(worker.execute(batch))
    assert scheduler.schedule().spoiled_rows == []
