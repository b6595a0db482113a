"""Ranks without a model, which check all that they are told, and whose tokens depend on every token before them."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Container

import msgspec
from tests.server.fake_engine import INFO

from shardwright.cache.spec import CacheGroup
from shardwright.engine.limits import SchedulerLimits
from shardwright.engine.messages import EngineInfo
from shardwright.errors import RanksLostError
from shardwright.worker.batch import Batch, StepResult

VOCAB_SIZE = 1000


def next_token(tokens: list[int]) -> int:
    """What follows these tokens."""
    return zlib.crc32(repr(tokens).encode()) % VOCAB_SIZE


def guess(tokens: list[int], num: int) -> list[int]:
    """What may follow these tokens: after two right guesses there often is a wrong one."""
    guessed: list[int] = []
    for _ in range(num):
        is_wrong = zlib.crc32(repr([tokens, guessed]).encode()) % 3 == 0
        guessed.append((next_token(tokens + guessed) + is_wrong) % VOCAB_SIZE)
    return guessed


class FakeRank:
    """A rank that keeps in every slot of its cache the tokens up to the one whose slot it is.

    Args:
        groups: cache groups of the model.
        block_size: tokens per block.
        samples: whether it samples, or learns what was sampled from the batches that follow.
        sample: the token after others.
        max_model_len: tokens of the longest sequence that proposals are made for.
    """

    def __init__(
        self,
        groups: list[CacheGroup],
        *,
        block_size: int,
        samples: bool = True,
        sample: Callable[[list[int]], int] = next_token,
        max_model_len: int = 1 << 30,
    ) -> None:
        self._groups = groups
        self._block_size = block_size
        self._samples = samples
        self._sample = sample
        self._max_model_len = max_model_len
        self._tokens: dict[int, list[int]] = {}
        self._tables: dict[tuple[int, int], dict[int, int]] = {}
        self._cache: dict[tuple[int, int], tuple[int, ...]] = {}

    def execute(self, batch: Batch) -> StepResult:
        """Check a batch, and sample."""
        self._take_in(batch)
        writer: dict[tuple[int, int], int] = {}
        sampled: list[int | None] = []
        accepted: dict[int, int] = {}
        for place, (row, start, count) in enumerate(zip(batch.rows, batch.num_computed, batch.num_tokens, strict=True)):
            known, proposed = self._tokens[row], batch.proposed.get(place, [])
            tokens = known + proposed
            assert start + count <= len(tokens), "a token to compute is not known here"
            assert not proposed or start + count == len(tokens), "proposed tokens are left out"
            for index, group in enumerate(self._groups):
                for position in range(start, start + count):
                    slot = self._slot(row, index, position)
                    assert slot not in writer, "two tokens share a slot"
                    writer[slot] = row
                    self._cache[slot] = tuple(tokens[: position + 1])
                    for seen in range(group.visibility.first_visible(position), position):
                        content = self._cache[self._slot(row, index, seen)]
                        assert content == tuple(tokens[: seen + 1]), "a token sees what is not before it"
            if start + count < len(tokens):
                sampled.append(None)
                continue
            num_accepted = 0
            while (
                proposed[num_accepted:] and self._sample(tokens[: len(known) + num_accepted]) == proposed[num_accepted]
            ):
                num_accepted += 1
            accepted[place] = num_accepted
            sampled.append(self._sample(tokens[: len(known) + num_accepted]))
            if self._samples:
                self._tokens[row] = [
                    *known,
                    *proposed[:num_accepted],
                    self._sample(tokens[: len(known) + num_accepted]),
                ]
        proposals = self._propose(batch, writer) if self._samples else {}
        return StepResult(
            token_ids=sampled, logprobs={}, prompt_logprobs={}, num_accepted=accepted, proposals=proposals
        )

    def _propose(self, batch: Batch, writer: dict[tuple[int, int], int]) -> dict[int, list[int]]:
        """What a draft model might say, and whether there are slots for all but the last token of it."""
        proposals: dict[int, list[int]] = {}
        for place, num in batch.num_to_propose.items():
            tokens = self._tokens[row := batch.rows[place]]
            proposals[place] = guess(tokens, min(num, self._max_model_len - len(tokens)))
            for index in range(len(self._groups)):
                for position in range(len(tokens) - 1, len(tokens) + len(proposals[place]) - 1):
                    slot = self._slot(row, index, position)
                    assert writer.setdefault(slot, row) == row, "two sequences share a slot"
        return proposals

    def _take_in(self, batch: Batch) -> None:
        assert not set(batch.sampled_rows) & set(batch.freed_rows)
        if not self._samples:
            for row, token in zip(batch.sampled_rows, batch.sampled_token_ids, strict=True):
                self._tokens[row].append(token)
        for row in batch.freed_rows:
            self._tokens.pop(row, None)
        for new in batch.new_rows:
            assert new.row not in self._tokens, "a row is taken before it was freed"
            self._tokens[new.row] = list(new.token_ids)
            for group in range(len(self._groups)):
                self._tables[new.row, group] = {}
        for update in batch.table_updates:
            assert update.row in self._tokens
            table = self._tables[update.row, update.group]
            table.update({update.start + i: block for i, block in enumerate(update.blocks)})

    def blocks(self, batch: Batch, *, written: bool) -> dict[int, set[tuple[int, int]]]:
        """By row, the blocks that a batch writes to, or those that it reads and writes; after it was carried out."""
        result: dict[int, set[tuple[int, int]]] = {}
        for row, start, count in zip(batch.rows, batch.num_computed, batch.num_tokens, strict=True):
            result[row] = set()
            for index, group in enumerate(self._groups):
                first = start if written else group.visibility.first_visible(start)
                places = range(first // self._block_size, (start + count - 1) // self._block_size + 1)
                result[row] |= {(index, self._tables[row, index][place]) for place in places}
        return result

    def _slot(self, row: int, group: int, position: int) -> tuple[int, int]:
        block = self._tables[row, group][position // self._block_size]
        assert block != 0, "a token has no block"
        return group, block * self._block_size + position % self._block_size


class FakeRanks:
    """An executor of two pipeline stages: the first carries out a batch when it is submitted, the last one when its
    result is asked for. Where batches run ahead of results, there is the last one alone.

    Args:
        groups: cache groups of the model.
        limits: of the scheduler.
        losses: numbers of the calls, from 0 on, at which ranks are lost.
    """

    def __init__(self, groups: list[CacheGroup], limits: SchedulerLimits, *, losses: Container[int] = ()) -> None:
        self.groups = groups
        self.max_in_flight = limits.max_in_flight
        self.runs_ahead = limits.runs_ahead
        self.info: EngineInfo = msgspec.structs.replace(
            INFO,
            vocab_size=VOCAB_SIZE,
            max_model_len=limits.max_model_len,
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
        self.num_restarts = 0
        self.is_closed = False
        self._limits = limits
        self._losses = losses
        self._num_calls = 0
        self._start()

    def submit(self, batch: Batch) -> None:
        self._may_lose()
        assert batch.rows
        assert len(self._in_flight) < self.max_in_flight
        if self.runs_ahead:
            self._in_flight.append((batch, {}))
            return
        self._first.execute(batch)
        written = self._first.blocks(batch, written=True)
        for earlier, used in self._in_flight:
            gone = set(batch.freed_rows) | {new.row for new in batch.new_rows}
            assert not gone & set(earlier.rows), "a row in flight changes hands"
            for row, blocks in used.items():
                others = set().union(*(written[other] for other in written if other != row))
                assert not others & blocks, "a block in flight is written to by another sequence"
        self._in_flight.append((batch, self._first.blocks(batch, written=False)))

    def collect(self) -> StepResult:
        self._may_lose()
        batch, _ = self._in_flight.popleft()
        return self._last.execute(batch)

    def fail(self) -> None:
        """The oldest batch in flight is not carried out to its end, the others not at all."""
        if self._in_flight:
            self._last.execute(self._in_flight[0][0])
        self._in_flight.clear()

    def restart(self) -> None:
        self._may_lose()
        self.num_restarts += 1
        self._start()

    def close(self) -> None:
        self.is_closed = True

    def _start(self) -> None:
        self._in_flight: deque[tuple[Batch, dict[int, set[tuple[int, int]]]]] = deque()
        block_size = self._limits.block_size
        self._first = FakeRank(self.groups, block_size=block_size, samples=False)
        self._last = FakeRank(self.groups, block_size=block_size, max_model_len=self._limits.max_model_len)

    def _may_lose(self) -> None:
        self._num_calls += 1
        if self._num_calls - 1 in self._losses:
            raise RanksLostError("rank 1 died")
