"""Several cores as one: where requests go, and what becomes of them when a core is lost. The cores here run in this
process, on ranks without a model.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.fake_ranks import FakeRanks, next_token

from shardwright.cache.spec import CacheGroup, Visibility
from shardwright.config import EngineConfig
from shardwright.engine import replicas as replicas_module
from shardwright.engine.core import EngineCore
from shardwright.engine.limits import SchedulerLimits
from shardwright.engine.messages import (
    Abort,
    Add,
    Command,
    EngineInfo,
    EngineRequest,
    Event,
    Outputs,
    Ready,
    ResetPrefixCache,
)
from shardwright.engine.replicas import MAX_LOSSES, Replicas
from shardwright.errors import EngineDeadError
from shardwright.sampling_params import SamplingParams

LIMITS = SchedulerLimits(
    max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4, num_blocks=60, max_in_flight=2
)
KILLED = EngineDeadError("killed by signal 9")


class LocalClient:
    """A core in this process, in the place of one in another."""

    def __init__(self, config: EngineConfig, environment: dict[str, str]) -> None:
        self.config = config
        self.core = EngineCore(config, FakeRanks([CacheGroup(Visibility(), (0,))], LIMITS))
        self.info = self.core.info
        self.is_alive = True
        self.commands: list[Command] = []

    def wait_until_ready(self) -> EngineInfo:
        return self.info

    def send(self, command: Command) -> None:
        self.commands.append(command)
        if isinstance(command, Add):
            copied = msgspec.msgpack.decode(msgspec.msgpack.encode(command.request), type=EngineRequest)
            self.core.add(copied)
        elif isinstance(command, Abort):
            for request_id in command.request_ids:
                self.core.abort(request_id)
        elif isinstance(command, ResetPrefixCache):
            self.core.reset_prefix_cache()

    def step(self) -> Event:
        return Outputs(self.core.step())

    def close(self, *, gently: bool = True) -> None:
        self.is_alive = False


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "CoreClient", LocalClient)


class Cluster:
    """Replicas and all that their streams got."""

    def __init__(self, num_replicas: int) -> None:
        config = EngineConfig.from_options("fake", data_parallel_size=num_replicas, device="cpu")
        self.cores = Replicas(config)
        self.cores.wait_until_ready()
        self.tokens: dict[str, list[int]] = {}

    def client(self, index: int) -> LocalClient:
        client = self.cores.clients[index]
        assert isinstance(client, LocalClient)
        return client

    def add(self, name: str, prompt: list[int], *, max_tokens: int = 6) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        self.tokens[name] = []
        self.cores.add(EngineRequest(request_id=name, prompt_token_ids=prompt, sampling_params=params))

    def replica_of(self, name: str) -> int:
        [index] = [i for i in self.cores.clients if name in self.client(i).core.scheduler._requests]
        return index

    def step(self) -> None:
        for index in self.cores.clients:
            if self.client(index).core.has_work:
                outputs = self.cores.take(index, self.client(index).step())
                for output in outputs.outputs if outputs else []:
                    self.tokens[output.request_id] += output.new_token_ids

    def kill(self, index: int) -> bool:
        self.client(index).is_alive = False
        return self.cores.lose(index, KILLED)

    def start_again(self, index: int) -> None:
        assert self.cores.take(index, Ready(self.client(index).info)) is None

    def run(self) -> None:
        for _ in range(500):
            if not self.cores.num_unfinished:
                return
            self.step()
        raise AssertionError("requests starve")


def expected(prompt: list[int], max_tokens: int = 6) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def prompts(count: int) -> Iterator[tuple[str, list[int]]]:
    for index in range(count):
        yield str(index), [100 * index + i for i in range(5 + index)]


def test_requests_are_spread_and_each_gets_its_tokens() -> None:
    cluster = Cluster(3)
    for name, prompt in prompts(9):
        cluster.add(name, prompt)
    assert {cluster.replica_of(str(i)) for i in range(3)} == {0, 1, 2}
    cluster.run()
    assert cluster.tokens == {name: expected(prompt) for name, prompt in prompts(9)}
    assert cluster.cores.stats.num_generated_tokens == 9 * 6
    assert [state.num_running for state, _ in cluster.cores.states] == [0, 0, 0]


def test_a_prompt_goes_where_its_beginning_is_cached_answers_included() -> None:
    cluster = Cluster(3)
    for name, prompt in prompts(3):
        cluster.add(name, prompt)
    home = cluster.replica_of("1")
    cluster.run()
    [(_, prompt)] = [item for item in prompts(3) if item[0] == "1"]
    cluster.add("next turn", prompt + expected(prompt) + [1, 2, 3])
    assert cluster.replica_of("next turn") == home
    cluster.run()
    assert cluster.client(home).core.stats.num_prefix_hit_tokens == 8  # whole blocks of 6 + 6 tokens, the last computed


def test_reset_prefix_cache_reaches_all_replicas() -> None:
    cluster = Cluster(2)
    cluster.add("a", list(range(20)))
    cluster.run()
    cluster.cores.reset_prefix_cache()
    cluster.add("b", list(range(20)))
    cluster.run()
    assert cluster.cores.stats.num_prefix_hit_tokens == 0


def test_an_abort_reaches_the_replica_that_has_the_request_alone() -> None:
    cluster = Cluster(2)
    for name, prompt in prompts(2):
        cluster.add(name, prompt, max_tokens=30)
    index = cluster.replica_of("1")
    cluster.cores.abort(["1", "unknown"])
    assert cluster.client(index).commands[-1] == Abort(["1"])
    assert not any(isinstance(command, Abort) for command in cluster.client(1 - index).commands)
    cluster.run()
    assert cluster.tokens["0"] == expected(list(range(5)), 30)


@given(kills=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8)), max_size=4))
@settings(deadline=None)
def test_lost_replicas_change_no_token(kills: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(replicas_module, "CoreClient", LocalClient)
        cluster = Cluster(3)
        for name, prompt in prompts(8):
            cluster.add(name, prompt, max_tokens=12)
        for index, num_steps in kills:
            for _ in range(num_steps):
                cluster.step()
            if index in cluster.cores.clients and cluster.kill(index):
                cluster.start_again(index)
        cluster.run()
        assert cluster.tokens == {name: expected(prompt, 12) for name, prompt in prompts(8)}
        assert all(replica.load == 0 for replica in cluster.cores._replicas)


def test_nothing_goes_to_a_replica_that_starts_again_until_it_is_ready() -> None:
    cluster = Cluster(2)
    assert cluster.kill(0)
    assert [is_up for _, is_up in cluster.cores.states] == [False, True]
    cluster.add("a", [1, 2, 3])
    assert cluster.replica_of("a") == 1
    cluster.start_again(0)
    cluster.add("b", [4, 5, 6])
    assert cluster.replica_of("b") == 0
    cluster.run()
    assert cluster.cores.stats.num_restarts == 1


def test_the_last_replicas_loss_is_the_engines() -> None:
    cluster = Cluster(2)
    cluster.add("a", [1, 2, 3])
    cluster.kill(0)
    with pytest.raises(EngineDeadError, match="signal 9"):
        cluster.kill(1)
    assert not cluster.cores.is_alive


def test_a_single_cores_loss_is_the_engines() -> None:
    cluster = Cluster(1)
    with pytest.raises(EngineDeadError, match="signal 9"):
        cluster.kill(0)


def test_a_replica_that_never_gets_anywhere_is_given_up_while_others_serve(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(2)
    started_anew = [cluster.kill(0) for _ in range(MAX_LOSSES)]
    assert started_anew == [True] * (MAX_LOSSES - 1) + [False]
    assert "given up" in caplog.records[-1].getMessage()
    assert list(cluster.cores.clients) == [1]
    cluster.add("a", [1, 2, 3])
    cluster.run()
    assert cluster.tokens["a"] == expected([1, 2, 3])


def test_tokens_in_between_let_a_replica_be_started_again() -> None:
    cluster = Cluster(2)
    for round_ in range(MAX_LOSSES + 1):
        assert cluster.kill(0)
        cluster.start_again(0)
        for index in range(2):
            cluster.add(f"{round_}-{index}", [100 * round_ + 10 * index, 2, 3])
        assert cluster.replica_of(f"{round_}-0") != cluster.replica_of(f"{round_}-1")
        cluster.run()


def test_a_replica_that_comes_back_with_less_memory_is_not_taken() -> None:
    cluster = Cluster(2)
    cluster.kill(0)
    info = msgspec.structs.replace(cluster.client(0).info, max_model_len=32)
    with pytest.raises(EngineDeadError, match="memory for 32 tokens"):
        cluster.cores.take(0, Ready(info))


def test_counters_do_not_go_back_when_a_replica_is_lost() -> None:
    cluster = Cluster(2)
    for name, prompt in prompts(4):
        cluster.add(name, prompt)
    cluster.run()
    before = cluster.cores.states[0][0].num_generated_tokens
    assert before > 0
    cluster.kill(0)
    after, is_up = cluster.cores.states[0]
    assert (after.num_generated_tokens, after.num_restarts, is_up) == (before, 1, False)


def test_replicas_have_seeds_of_their_own() -> None:
    cluster = Cluster(2)
    assert [cluster.client(index).config.model.seed for index in range(2)] == [0, 1]
