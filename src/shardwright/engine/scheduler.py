"""Which tokens of which requests the next step computes. No torch here.

There are no phases: a request has tokens to compute, and every step gives it some of one budget (vLLM v1 thinks alike).
A step is filled in this order:
  1. running requests with one token left (decodes), so that nobody's stream stalls behind a long prompt;
  2. running requests with more left: prompts cut into chunks, and what was preempted;
  3. waiting requests, as long as budget, rows and blocks last, unless running ones lacked blocks in this very step.
When blocks run out, the running request that is last in order is preempted: its blocks go back, and it waits to be
computed anew. The first in order is never preempted for another, so it always ends: nobody starves.

Decodes may have tokens that are only proposed (engine/speculation.py) behind the one that they have; those that do not
come true are taken off again what counts as computed, and their places in the blocks are written anew.

Where the executor works on several batches at a time, decodes are dealt out evenly to as many. What is in flight keeps
its blocks: it is not preempted, and it leaves when its result is in, even if it was aborted before. Where batches run
ahead of results (engine/in_flight.py), all decodes are in each batch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from shardwright.cache.manager import PrefixHit
from shardwright.cache.spec import CacheGroup
from shardwright.engine.batch_builder import BatchBuilder
from shardwright.engine.in_flight import InFlight, ScheduledTokens
from shardwright.engine.limits import SchedulerLimits
from shardwright.engine.memory import SequenceMemory
from shardwright.engine.messages import EngineOutput, EngineRequest, SchedulerStats, TokenLogprobs
from shardwright.engine.queue import WaitingQueue
from shardwright.engine.request import Request, RequestState
from shardwright.engine.speculation import Speculation
from shardwright.outputs import FinishReason
from shardwright.worker.batch import Batch, StepResult

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Counters:
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    restarts: int = 0


class Scheduler:
    """Owns the requests, and decides who of them runs.

    Args:
        limits: of the engine.
        groups: cache groups of the model.
        speculation: guesses tokens ahead; None: nobody does.
    """

    def __init__(
        self, limits: SchedulerLimits, groups: list[CacheGroup], speculation: Speculation | None = None
    ) -> None:
        self.limits = limits
        self.speculation = speculation
        self.memory = SequenceMemory(limits, groups)
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self.in_flight = InFlight()
        self._requests: dict[str, Request] = {}
        """Those that have not ended, by id."""
        self._sampled: dict[int, list[int]] = {}
        """Tokens by row that came in since the last batch."""
        self._spoiled_rows: list[int] = []
        """Of sequences that ended since the last batch, because their logits were not numbers."""
        self._arrivals = 0
        self._counters = _Counters()

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    @property
    def num_generated_tokens(self) -> int:
        """Since the engine's start."""
        return self._counters.generated_tokens

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
        request.finish(FinishReason.ABORT)
        self._release(request)
        return True

    def schedule(self) -> Batch:
        """Plan the next step, which is in flight until `update`. The batch is empty when there is nothing to do."""
        step = BatchBuilder(self.limits.max_num_batched_tokens)
        decodes = [r for r in self.running if r.num_pending_tokens == 1]
        prefills = [r for r in self.running if r.num_pending_tokens > 1]
        share = self._decode_share(len(prefills))
        for request in decodes:
            if request.state is RequestState.RUNNING and step.budget > 0 and len(step) < share:
                self._schedule_running(step, request)
        if self.speculation is not None:
            self.speculation.add_proposals(step, self.memory)
        for request in prefills:
            if request.state is RequestState.RUNNING and step.budget > 0:
                self._schedule_running(step, request)
        for part in step.parts:
            self.memory.store_prefix(part.request, part.known_end)
        if step.may_start:
            while step.budget > 0 and self.memory.has_free_row and self._schedule_waiting(step):
                pass
        if self.speculation is not None:
            self.speculation.ask_for_drafts(step, self.memory)
        return self._launch(step)

    def update(self, result: StepResult) -> list[EngineOutput]:
        """Take in what the oldest step in flight computed; end what is done; free what is no longer seen."""
        outputs = []
        self._counters.steps += 1
        for place, part in enumerate(self.in_flight.pop_oldest()):
            self._counters.computed_tokens += part.num_tokens
            if part.request.is_finished:  # aborted while the step ran
                if not part.request.num_in_flight:
                    self.memory.give_back(part.request)
                continue
            output = self._take(part, place, result)
            if output is not None:
                outputs.append(output)
        return outputs

    def take_back(self) -> None:
        """The batch that was scheduled last has reached no worker, or to no end: its sequences wait again."""
        batch, parts = self.in_flight.pop_newest()
        self.memory.return_freed_rows(batch.freed_rows)
        for row, token in zip(batch.sampled_rows, batch.sampled_token_ids, strict=True):
            self._sampled.setdefault(row, []).append(token)
        self._spoiled_rows += batch.spoiled_rows
        for part in parts:
            request = part.request
            self.memory.forget_prefix(request)
            if request.num_in_flight:  # with what it computes before
                request.num_computed_tokens = part.start
                self.memory.tell_again(request)
            elif request.is_finished:  # aborted while the batch was in flight
                self._sampled.pop(request.held_row, None)
                self.memory.give_back(request)
            else:
                self._put_back(request)

    def start_over(self) -> None:
        """All that workers had in memory is gone: what ran or was in flight waits again, with the tokens it has."""
        self._counters.restarts += 1
        self.in_flight.clear()
        self.memory.reset()
        self._sampled.clear()
        self._spoiled_rows.clear()
        for request in self.running:
            request.row = request.blocks = None
            self._wait(request)
        self.running.clear()

    def stats(self) -> SchedulerStats:
        counters = self._counters
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_blocks=self.limits.num_blocks,
            num_free_blocks=self.memory.num_free_blocks,
            num_preemptions=counters.preemptions,
            num_prefix_query_tokens=counters.prefix_query_tokens,
            num_prefix_hit_tokens=counters.prefix_hit_tokens,
            num_computed_tokens=counters.computed_tokens,
            num_generated_tokens=counters.generated_tokens,
            num_proposed_tokens=0 if self.speculation is None else self.speculation.num_proposed,
            num_accepted_tokens=0 if self.speculation is None else self.speculation.num_accepted,
            num_steps=counters.steps,
            num_restarts=counters.restarts,
        )

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests are not touched."""
        self.memory.forget_prefixes()

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, rows and queues are consistent."""
        leaving = {part.request for part in self.in_flight if part.request.is_finished}
        self.memory.check_integrity([*self.running, *leaving])
        assert len(self.running) + len(self.waiting) == len(self._requests), "a request is in no queue, or in two"

    def _decode_share(self, num_prefills: int) -> int:
        """Most decodes of one batch, so that each batch in flight has as many."""
        num_batches = 1 if self.limits.runs_ahead else self.limits.max_in_flight
        return len(self.running) if num_batches == 1 else -(-(len(self.running) - num_prefills) // num_batches)

    def _launch(self, step: BatchBuilder) -> Batch:
        """The batch of a step, if it has anything to compute, is in flight from here on."""
        parts = step.parts
        if not parts:
            return step.build()
        batch = step.build(
            freed_rows=self.memory.take_freed_rows(), sampled=self._sampled, spoiled_rows=self._spoiled_rows
        )
        self._sampled.clear()
        self._spoiled_rows.clear()
        for part in parts:
            part.request.num_computed_tokens += part.num_tokens
            part.is_awaited = self.limits.runs_ahead and self._goes_on(part.request)
        self.in_flight.push(batch, parts)
        return batch

    def _goes_on(self, request: Request) -> bool:
        """Whether a sequence samples a token with what it has been given to compute, and may go on with that."""
        num_tokens = request.num_tokens + request.num_awaited_tokens
        is_full = request.is_full(num_tokens + 1, max_model_len=self.limits.max_model_len)
        return request.num_computed_tokens == num_tokens and not is_full

    def _schedule_running(self, step: BatchBuilder, request: Request) -> None:
        num_tokens = min(request.num_pending_tokens, step.budget)
        while not self.memory.grow(request, request.num_computed_tokens + num_tokens):
            step.may_start = False
            victim = max((r for r in self.running if not r.num_in_flight), key=lambda r: r.sort_key, default=request)
            if self.in_flight and victim.sort_key <= request.sort_key:
                return  # blocks may come back with what is in flight
            step.drop(victim)
            self._put_back(victim)
            self._counters.preemptions += 1
            if victim is request:
                return
        step.add(request, num_tokens, self.memory.news(request))

    def _schedule_waiting(self, step: BatchBuilder) -> bool:
        """Start the request at the head of the queue. False if it must go on waiting."""
        request = self.waiting.peek()
        if request is None:
            return False
        hit = self.memory.find_prefix(request)
        pending = request.num_tokens - hit.num_tokens
        num_tokens = min(pending, step.budget)
        if num_tokens < pending and not self.limits.enable_chunked_prefill:
            return False
        if not self.memory.has_room(request, hit, num_tokens, num_running=len(self.running)):
            return False
        self.waiting.pop()
        self._start(request, hit)
        step.announce(request)
        grown = self.memory.grow(request, hit.num_tokens + num_tokens)
        assert grown, "has_room promised blocks that the pool does not have"
        step.add(request, num_tokens, self.memory.news(request))
        # Started requests are not preempted in this step, so others in it may already build on their blocks.
        self.memory.store_prefix(request, hit.num_tokens + num_tokens)
        return True

    def _start(self, request: Request, hit: PrefixHit) -> None:
        self.memory.start(request, hit)
        request.state = RequestState.RUNNING
        request.num_computed_tokens = hit.num_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = hit.num_tokens
            self._counters.prefix_query_tokens += request.num_tokens
            self._counters.prefix_hit_tokens += hit.num_tokens
        self.running.append(request)

    def _take(self, part: ScheduledTokens, place: int, result: StepResult) -> EngineOutput | None:
        """What a step brought for one sequence; None if it is nothing that anybody waits for."""
        request, token = part.request, result.token_ids[place]
        num_accepted = result.num_accepted.get(place, 0)
        num_rejected = len(part.proposed) - num_accepted
        new_tokens = self._append(request, [*part.proposed[:num_accepted], *([] if token is None else [token])])
        if place in result.errors:
            self.memory.forget_prefix(request)
            self._spoiled_rows.append(request.held_row)
            if part.proposed:
                num_rejected += 1  # what comes before the spoiled ones is computed anew, alone
            else:
                logger.error("request %s ended: %s", request.request_id, result.errors[place])
                request.finish(FinishReason.ABORT)
        request.num_computed_tokens -= num_rejected
        if self.speculation is not None and (part.proposed or token is not None):
            self.speculation.take(part, place, result)
        if request.is_finished:
            self._release(request)
        else:
            self.memory.drop_unseen(request, part.end - num_rejected)
            if new_tokens:
                self._sampled[request.held_row] = new_tokens
        prompt_logprobs = _unsent(part, result.prompt_logprobs[place]) if place in result.prompt_logprobs else None
        if not new_tokens and not prompt_logprobs and not request.is_finished:
            return None
        logprobs = result.logprobs.get(place)
        return EngineOutput(
            request_id=request.request_id,
            new_token_ids=new_tokens,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=None if logprobs is None else logprobs[: len(new_tokens)],
            prompt_logprobs=prompt_logprobs or None,
            num_cached_tokens=request.num_cached_tokens or 0,
            num_proposed_tokens=len(part.proposed),
            num_accepted_tokens=num_accepted,
        )

    def _append(self, request: Request, tokens: list[int]) -> list[int]:
        """Give a request tokens, up to the one that ends it. Returns: those that it took."""
        for number, token in enumerate(tokens, start=1):
            request.append(token, max_model_len=self.limits.max_model_len)
            if request.is_finished:
                tokens = tokens[:number]
                break
        self._counters.generated_tokens += len(tokens)
        return tokens

    def _release(self, request: Request) -> None:
        """Let go of a finished request, and of what it holds unless that is in flight."""
        del self._requests[request.request_id]
        if self.waiting.remove(request.request_id) is None:
            self._leave(request)
            if not request.num_in_flight:
                self.memory.give_back(request)

    def _put_back(self, request: Request) -> None:
        """Let a running request wait and start anew later; it must not be in flight."""
        self._leave(request)
        self.memory.give_back(request)
        self._wait(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self._sampled.pop(request.held_row, None)

    def _wait(self, request: Request) -> None:
        request.state = RequestState.WAITING
        request.num_computed_tokens = 0
        self.waiting.push(request)


def _unsent(part: ScheduledTokens, prompt_logprobs: list[TokenLogprobs]) -> list[TokenLogprobs]:
    """Without those at positions computed again after preemption, which have been reported before."""
    unsent = prompt_logprobs[max(0, part.request.num_prompt_logprobs_sent - part.start) :]
    part.request.num_prompt_logprobs_sent += len(unsent)
    return unsent
