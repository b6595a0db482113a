"""An engine whose ranks are lost goes on as if nothing had happened, or gives up with the reason."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.fake_ranks import FakeRanks

from shardwright.cache.spec import CacheGroup, Visibility, VisibilityKind
from shardwright.config import EngineConfig
from shardwright.engine.core import EngineCore
from shardwright.engine.limits import SchedulerLimits
from shardwright.engine.messages import EngineOutputs, EngineRequest
from shardwright.errors import ConfigError, EngineDeadError, RanksLostError
from shardwright.sampling_params import SamplingParams
from shardwright.worker.batch import Batch, StepResult

GROUPS = [CacheGroup(Visibility(), (0, 1)), CacheGroup(Visibility(VisibilityKind.SLIDING, 8), (2, 3))]


def make_core(
    *, max_in_flight: int = 2, losses: frozenset[int] = frozenset(), num_blocks: int = 40
) -> tuple[EngineCore, FakeRanks]:
    limits = SchedulerLimits(
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=64,
        block_size=4,
        num_blocks=num_blocks,
        max_in_flight=max_in_flight,
    )
    ranks = FakeRanks(GROUPS, limits, losses=losses)
    return EngineCore(EngineConfig.from_options("fake"), ranks), ranks


def make_requests(max_tokens: int = 5) -> list[EngineRequest]:
    lengths = [3, 30, 30, 17, 1, 22]
    return [
        EngineRequest(
            request_id=str(i),
            prompt_token_ids=[100 * (i // 2) + j for j in range(length)],
            sampling_params=SamplingParams(max_tokens=max_tokens + i, temperature=0),
        )
        for i, length in enumerate(lengths)
    ]


def run(core: EngineCore, requests: list[EngineRequest] | None = None) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for request in requests or make_requests():
        core.add(request)
    for _ in range(1000):
        if not core.has_work:
            break
        for output in core.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
        core.scheduler.check_integrity()
    assert core.stats.num_free_blocks == core.stats.num_blocks
    return tokens


def undisturbed() -> dict[str, list[int]]:
    core, _ = make_core(max_in_flight=1)
    return run(core)


@pytest.mark.parametrize("max_in_flight", [2, 3, 4])
def test_batches_in_flight_change_no_token(max_in_flight: int) -> None:
    core, _ = make_core(max_in_flight=max_in_flight)
    assert run(core) == undisturbed()


@pytest.mark.parametrize("max_in_flight", [2, 3])
def test_preemption_spares_what_is_in_flight(max_in_flight: int) -> None:
    core, _ = make_core(max_in_flight=max_in_flight, num_blocks=28)
    roomy, _ = make_core(max_in_flight=1, num_blocks=400)
    assert run(core, make_requests(25)) == run(roomy, make_requests(25))
    assert core.stats.num_preemptions > 0


@given(
    losses=st.lists(st.integers(20, 60), max_size=5).map(
        lambda gaps: frozenset(sum(gaps[:i]) for i in range(len(gaps)))
    ),
    max_in_flight=st.integers(1, 3),
)
@settings(deadline=None)
def test_lost_ranks_change_no_token(losses: frozenset[int], max_in_flight: int) -> None:
    core, ranks = make_core(max_in_flight=max_in_flight, losses=losses)
    assert run(core) == undisturbed()
    assert core.stats.num_restarts == ranks.num_restarts


def test_lost_ranks_are_told_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    core, _ = make_core(losses=frozenset({7}))
    run(core)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "rank 1 died" in caplog.text


def test_ranks_that_are_lost_while_they_start_are_started_again() -> None:
    core, ranks = make_core(losses=frozenset({10, 11}))
    assert run(core) == undisturbed()
    assert ranks.num_restarts == 1


def test_three_losses_without_a_token_in_between_end_the_engine() -> None:
    core, _ = make_core(losses=frozenset({10, 11, 12}))
    with pytest.raises(EngineDeadError, match="lost 3 times and no token was generated in between.*rank 1 died"):
        run(core)


def test_losses_with_tokens_in_between_do_not_end_it() -> None:
    core, ranks = make_core(losses=frozenset(range(20, 2000, 20)))
    assert run(core) == undisturbed()
    assert ranks.num_restarts > 3


def test_ranks_that_cannot_be_started_end_the_engine_with_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    core, ranks = make_core(losses=frozenset({5}))

    def restart() -> None:
        raise ConfigError("no memory is left")

    monkeypatch.setattr(ranks, "restart", restart)
    with pytest.raises(EngineDeadError, match="could not be started anew: no memory is left.*rank 1 died"):
        run(core)


def test_aborts_while_ranks_are_lost_leave_nothing_behind() -> None:
    core, _ = make_core(losses=frozenset({9}))
    for request in make_requests():
        core.add(request)
    for _ in range(4):
        core.step()
    for request in make_requests():
        core.abort(request.request_id)
    while core.has_work:
        assert core.step().outputs == []
    core.scheduler.check_integrity()
    assert core.stats.num_free_blocks == core.stats.num_blocks


class Failing(FakeRanks):
    """Refuses the second batch."""

    num_submitted = 0

    def submit(self, batch: Batch) -> None:
        self.num_submitted += 1
        if self.num_submitted == 2:
            raise MemoryError("too large")
        super().submit(batch)


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_batch_that_fails_is_run_again_when_the_caller_goes_on(max_in_flight: int) -> None:
    core, _ = make_core(max_in_flight=max_in_flight)
    core.executor = failing = Failing(GROUPS, core.scheduler.limits)
    for request in make_requests():
        core.add(request)
    tokens: dict[str, list[int]] = {}

    def take(step: EngineOutputs) -> None:
        for output in step.outputs:
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)

    if max_in_flight == 1:
        take(core.step())
    with pytest.raises(MemoryError):
        core.step()
    core.scheduler.check_integrity()
    while core.has_work:
        take(core.step())
    assert failing.num_submitted > 2
    assert tokens == undisturbed()


def test_decodes_are_dealt_out_evenly_to_the_batches_in_flight() -> None:
    core, ranks = make_core()
    seen: list[list[int]] = []
    submit = ranks.submit

    def watch(batch: Batch) -> None:
        seen.append(batch.rows)
        submit(batch)

    ranks.submit = watch  # type: ignore[method-assign]
    for index in range(4):
        params = SamplingParams(max_tokens=20, temperature=0)
        core.add(EngineRequest(request_id=str(index), prompt_token_ids=[index], sampling_params=params))
    while core.has_work:
        core.step()
    assert [len(rows) for rows in seen[1:-2]] == [2] * len(seen[1:-2])
    assert all(not set(a) & set(b) for a, b in itertools.pairwise(seen[1:]))


def test_closing_a_core_ends_its_ranks() -> None:
    core, ranks = make_core()
    core.close()
    assert ranks.is_closed


def test_a_lost_result_is_not_asked_for_again() -> None:
    core, ranks = make_core(max_in_flight=2)
    core.add(make_requests()[0])
    collect = ranks.collect

    def lose() -> StepResult:
        ranks.collect = collect  # type: ignore[method-assign]
        raise RanksLostError("rank 0 hangs")

    ranks.collect = lose  # type: ignore[method-assign]
    assert core.step().outputs == []
    assert core.stats.num_waiting == 1
    assert len(core.scheduler.in_flight) == 0
