"""Which tokens of which requests the next step computes. No torch here.

There are no phases: a request has tokens to compute, and every step gives it some of one budget (vLLM v1 thinks alike).
A step is filled in this order:
  1. running requests with one token left (decodes), so that nobody's stream stalls behind a long prompt;
  2. running requests with more left: prompts cut into chunks, and what was preempted;
  3. waiting requests, as long as budget, rows and blocks last, unless something was preempted in this very step.
When blocks run out, the running request that is last in order is preempted: its blocks go back, and it waits to be
computed anew. The first in order is never preempted for another, so it always ends: nobody starves.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from shardwright.cache.block_pool import BlockPool
from shardwright.cache.manager import BlockManager, PrefixHit
from shardwright.cache.spec import CacheGroup, blocks_for_sequence
from shardwright.engine.messages import EngineOutput, EngineRequest, SchedulerStats
from shardwright.engine.queue import WaitingQueue
from shardwright.engine.request import Request, RequestState
from shardwright.outputs import FinishReason
from shardwright.worker.batch import Batch, NewRow, StepResult, TableUpdate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """Resolved limits of one engine."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    by_priority: bool = False


@dataclass(slots=True)
class _Counters:
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0


@dataclass(slots=True)
class _Step:
    """A batch in the making."""

    budget: int
    requests: list[Request] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    updates: list[TableUpdate] = field(default_factory=list)
    has_preempted: bool = False

    def add(self, request: Request, num_tokens: int) -> None:
        self.requests.append(request)
        self.num_tokens.append(num_tokens)
        self.budget -= num_tokens

    def drop(self, request: Request) -> None:
        """Take back what was planned for a request that is preempted in the same step."""
        if request in self.requests:
            place = self.requests.index(request)
            self.budget += self.num_tokens.pop(place)
            del self.requests[place]
            self.updates = [update for update in self.updates if update.row != request.row]


class Scheduler:
    """Owns the requests, their blocks and their rows.

    Args:
        limits: of the engine.
        groups: cache groups of the model.
    """

    def __init__(self, limits: SchedulerLimits, groups: list[CacheGroup]) -> None:
        self.limits = limits
        self.blocks = BlockManager(
            BlockPool(limits.num_blocks),
            groups,
            block_size=limits.block_size,
            enable_prefix_caching=limits.enable_prefix_caching,
        )
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._freed_rows: list[int] = []
        self._arrivals = 0
        self._counters = _Counters()
        self._scheduled: list[tuple[Request, int]] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def add(self, message: EngineRequest) -> None:
        """Queue a request. Raises ValueError if its id is in use."""
        if message.request_id in self._requests:
            raise ValueError(f"request id {message.request_id!r} is in use")
        self._arrivals += 1
        request = Request(message, (message.priority if self.limits.by_priority else 0, self._arrivals))
        self._requests[request.request_id] = request
        self.waiting.push(request)

    def abort(self, request_id: str) -> bool:
        """End a request at once, wherever it is. False if it is not there (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, FinishReason.ABORT)
        return True

    def schedule(self) -> Batch:
        """Plan the next step. The batch is empty when there is nothing to do."""
        step = _Step(budget=self.limits.max_num_batched_tokens)
        decodes = [r for r in self.running if r.num_pending_tokens == 1]
        prefills = [r for r in self.running if r.num_pending_tokens != 1]
        for request in decodes + prefills:
            if request.state is RequestState.RUNNING and step.budget > 0:
                self._schedule_running(step, request)
        self._store_prefixes(step.requests, step.num_tokens)
        if not step.has_preempted:
            while step.budget > 0 and self._free_rows and self._schedule_waiting(step):
                pass
        self._scheduled = list(zip(step.requests, step.num_tokens, strict=True))
        batch = Batch(
            rows=[_row(r) for r in step.requests],
            num_computed=[r.num_computed_tokens for r in step.requests],
            num_tokens=step.num_tokens,
            new_rows=step.new_rows,
            table_updates=step.updates,
            freed_rows=self._freed_rows,
        )
        if batch.rows:
            self._freed_rows = []
        for request, num_tokens in self._scheduled:
            request.num_computed_tokens += num_tokens
        return batch

    def update(self, result: StepResult) -> list[EngineOutput]:
        """Take in what the step computed; end what is done; free what is no longer seen."""
        outputs = []
        self._counters.steps += 1
        for place, (request, num_tokens) in enumerate(self._scheduled):
            self._counters.computed_tokens += num_tokens
            if request.is_finished:  # aborted while the step ran
                continue
            token = result.token_ids[place]
            logprobs = result.logprobs.get(place)
            prompt_logprobs = result.prompt_logprobs.get(place)
            if prompt_logprobs is not None:
                # Positions computed again after preemption have been reported before.
                first = request.num_computed_tokens - num_tokens
                prompt_logprobs = prompt_logprobs[max(0, request.num_prompt_logprobs_sent - first) :]
                request.num_prompt_logprobs_sent += len(prompt_logprobs)
            if token is not None:
                request.append(token, max_model_len=self.limits.max_model_len)
                self._counters.generated_tokens += 1
            if place in result.errors:
                logger.error("request %s ended: %s", request.request_id, result.errors[place])
                self._forget_prefixes(request)
                request.finish(FinishReason.ABORT)
            if request.is_finished:
                self._release(request)
            elif request.blocks is not None:
                self._drop_unseen(request)
            if token is not None or prompt_logprobs or request.is_finished:
                outputs.append(
                    EngineOutput(
                        request_id=request.request_id,
                        new_token_ids=[] if token is None else [token],
                        finish_reason=request.finish_reason,
                        stop_reason=request.stop_reason,
                        logprobs=[logprobs] if logprobs is not None else None,
                        prompt_logprobs=prompt_logprobs or None,
                        num_cached_tokens=request.num_cached_tokens or 0,
                    )
                )
        self._scheduled = []
        return outputs

    def stats(self) -> SchedulerStats:
        counters = self._counters
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_blocks=self.limits.num_blocks,
            num_free_blocks=self.blocks.pool.num_free,
            num_preemptions=counters.preemptions,
            num_prefix_query_tokens=counters.prefix_query_tokens,
            num_prefix_hit_tokens=counters.prefix_hit_tokens,
            num_computed_tokens=counters.computed_tokens,
            num_generated_tokens=counters.generated_tokens,
            num_steps=counters.steps,
        )

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests are not touched."""
        self.blocks.pool.forget_all()

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, rows and queues are consistent."""
        tables = [table for r in self._requests.values() if r.blocks for table in r.blocks.tables]
        self.blocks.pool.check_integrity(tables)
        rows = [_row(r) for r in self.running]
        assert sorted(rows + self._free_rows) == list(range(self.limits.max_num_seqs)), "a row is lost or owned twice"
        assert len(self.running) + len(self.waiting) == len(self._requests), "a request is in no queue, or in two"

    def _schedule_running(self, step: _Step, request: Request) -> None:
        assert request.blocks is not None
        num_tokens = min(request.num_pending_tokens, step.budget)
        while not self.blocks.grow(request.blocks, request.num_computed_tokens + num_tokens):
            victim = max(self.running, key=lambda r: r.sort_key)
            self._preempt(step, victim)
            if victim is request:
                return
        self._note_new_blocks(step, request)
        step.add(request, num_tokens)

    def _schedule_waiting(self, step: _Step) -> bool:
        """Start the request at the head of the queue. False if it must go on waiting."""
        request = self.waiting.peek()
        if request is None:
            return False
        hit = self._find_prefix(request)
        pending = request.num_tokens - hit.num_tokens
        num_tokens = min(pending, step.budget)
        if num_tokens < pending and not self.limits.enable_chunked_prefill:
            return False
        if not self._has_room(request, hit, num_tokens):
            return False
        self.waiting.pop()
        self._start(step, request, hit)
        assert request.blocks is not None
        grown = self.blocks.grow(request.blocks, hit.num_tokens + num_tokens)
        assert grown, "can_start promised blocks that the pool does not have"
        self._note_new_blocks(step, request)
        step.add(request, num_tokens)
        # Started requests are not preempted in this step, so others in it may already build on their blocks.
        self._store_prefixes([request], [num_tokens])
        return True

    def _has_room(self, request: Request, hit: PrefixHit, num_tokens: int) -> bool:
        """Whether blocks suffice for the first chunk and, beside others, for all that is known of the request.

        Without the second condition a long prompt would start, run out, be preempted, and start again.
        """
        if not self.blocks.can_start(hit, hit.num_tokens + num_tokens):
            return False
        if not self.running:
            return True
        whole = blocks_for_sequence(
            self.blocks.groups,
            num_tokens=request.num_tokens + 1,
            chunk=self.limits.max_num_batched_tokens,
            block_size=self.limits.block_size,
        )
        held = sum(len(table) - self.blocks.pool.num_unheld(table) for table in hit.tables)
        spare = len(self.running) * len(self.blocks.groups)  # each running sequence may need a block in the next steps
        return whole - held + spare <= self.blocks.pool.num_free

    def _find_prefix(self, request: Request) -> PrefixHit:
        if request.params.prompt_logprobs is not None:  # needs the logits of every prompt position
            return PrefixHit()
        keys = request.block_keys(self.limits.block_size) if self.limits.enable_prefix_caching else []
        return self.blocks.find_prefix(keys, max_tokens=request.num_tokens - 1)

    def _start(self, step: _Step, request: Request, hit: PrefixHit) -> None:
        request.state = RequestState.RUNNING
        request.row = self._free_rows.pop()
        request.blocks = self.blocks.start(hit)
        request.num_computed_tokens = hit.num_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = hit.num_tokens
            self._counters.prefix_query_tokens += request.num_tokens
            self._counters.prefix_hit_tokens += hit.num_tokens
        self.running.append(request)
        step.new_rows.append(
            NewRow(
                row=request.row,
                token_ids=list(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                sampling_params=request.params,
                stop_token_ids=request.stop_token_ids,
            )
        )

    def _note_new_blocks(self, step: _Step, request: Request) -> None:
        """Tell the worker of blocks it has not been told of."""
        assert request.blocks is not None
        for group, table in enumerate(request.blocks.tables):
            told = request.blocks.num_told[group]
            if told < len(table):
                step.updates.append(TableUpdate(_row(request), group, told, table[told:]))
                request.blocks.num_told[group] = len(table)

    def _store_prefixes(self, requests: list[Request], num_tokens: list[int]) -> None:
        if not self.limits.enable_prefix_caching:
            return
        for request, count in zip(requests, num_tokens, strict=True):
            assert request.blocks is not None
            end = request.num_computed_tokens + count
            if end // self.limits.block_size > min(request.blocks.num_stored):
                self.blocks.store(request.blocks, request.block_keys(self.limits.block_size), end)

    def _forget_prefixes(self, request: Request) -> None:
        assert request.blocks is not None
        for table in request.blocks.tables:
            self.blocks.pool.forget(table)

    def _drop_unseen(self, request: Request) -> None:
        assert request.blocks is not None
        self.blocks.drop_unseen(request.blocks, request.num_computed_tokens)

    def _preempt(self, step: _Step, request: Request) -> None:
        step.drop(request)
        step.has_preempted = True
        self._leave(request)
        request.state = RequestState.WAITING
        request.num_computed_tokens = 0
        self.waiting.push(request)
        self._counters.preemptions += 1

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.finish(reason)
        self._release(request)

    def _release(self, request: Request) -> None:
        """Let go of all that a finished request holds."""
        if self.waiting.remove(request.request_id) is None:
            self._leave(request)
        del self._requests[request.request_id]

    def _leave(self, request: Request) -> None:
        """Take a request out of the running ones: its blocks and its row are free again."""
        self.running.remove(request)
        assert request.blocks is not None
        self.blocks.release(request.blocks)
        request.blocks = None
        self._free_rows.append(_row(request))
        self._freed_rows.append(_row(request))
        request.row = None


def _row(request: Request) -> int:
    assert request.row is not None
    return request.row
