"""AsyncLLM: streams for asyncio programs, with the engine's cores in processes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from shardwright.config import EngineConfig
from shardwright.engine.cumulative_output import CumulativeOutput
from shardwright.engine.frontend import Frontend, load_frontend_tokenizer
from shardwright.engine.input_processor import Prompt
from shardwright.engine.messages import EngineInfo, EngineOutputs, SchedulerStats
from shardwright.engine.output_processor import ProcessedOutputs
from shardwright.engine.pooling_frontend import PoolingFrontend, PoolingJob
from shardwright.engine.receiver import Receiver
from shardwright.engine.replicas import Replicas
from shardwright.errors import EngineDeadError, ShardwrightError
from shardwright.models.tokenizer import Tokenizer
from shardwright.outputs import ClassificationOutput, EmbeddingOutput, RequestOutput, ScoreOutput
from shardwright.sampling_params import SamplingParams

PoolingResult = TypeVar("PoolingResult")


@dataclass(slots=True)
class _Stream:
    """A request under way, as its caller waits for it."""

    sequence_ids: list[str]
    queue: asyncio.Queue[RequestOutput | ShardwrightError] = field(default_factory=asyncio.Queue)


class AsyncLLM:
    """A model that serves many callers at once. To be used from one event loop.

    Args:
        model: a directory, a hub id, `package.module:factory`, a name from `register_model`, or `smollm2-135m`.
        options: the engine's options, named as the CLI's flags with underscores (see `shardwright.config`).

    Raises: UsageError for models, weights and options that do not work; EngineDeadError if a core died at start.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._start(EngineConfig.from_options(model, **options))

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """An engine from its configuration record."""
        llm = cls.__new__(cls)
        llm._start(config)
        return llm

    def _start(self, config: EngineConfig) -> None:
        self.config = config
        self._streams: dict[str, _Stream] = {}
        self._futures: dict[str, asyncio.Future[bytes]] = {}
        self._error: ShardwrightError | None = None
        self._cores = Replicas(config)
        self._receiver = Receiver(self._cores, take=self._take, fail=self._fail)
        try:
            tokenizer = load_frontend_tokenizer(config)  # while the cores load the model
            self.info: EngineInfo = self._cores.wait_until_ready()
            self._frontend = Frontend(tokenizer, self.info)
            self._pooling = PoolingFrontend(tokenizer, self.info)
        except BaseException:
            self._cores.close()
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        return self._frontend.tokenizer

    @property
    def stats(self) -> SchedulerStats:
        """State of the scheduler after the latest step; sums, where there are several."""
        return self._cores.stats

    @property
    def replica_stats(self) -> list[tuple[SchedulerStats, bool]]:
        """Per replica, the state of its scheduler, and whether it takes requests."""
        return self._cores.states

    @property
    def is_alive(self) -> bool:
        """Whether a core runs. One that starts lost ranks anew does: its requests wait, and go on."""
        return self._error is None and self._cores.is_alive

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._streams) + len(self._futures)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        stream: Literal["cumulative", "delta"] = "cumulative",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt, yielding as steps bring tokens. Closing the generator aborts the request.

        Args:
            prompt: a text, token ids, or a dict with `prompt` or `prompt_token_ids`.
            sampling_params: how to sample and when to stop.
            request_id: names the request in logs and for `abort`; must be unique among those running.
            priority: lower runs first, under the priority policy.
            stream: "cumulative" outputs hold all so far; "delta" ones only what is new.

        Raises: RequestError at the first iteration; EngineDeadError when no core is left.
        """
        if self._error is not None:
            raise self._error
        self._receiver.start()
        submission = self._frontend.submit(prompt, sampling_params, request_id=request_id, priority=priority)
        own = self._streams[submission.request_id] = _Stream([s.request_id for s in submission.sequences])
        cumulative = CumulativeOutput() if stream == "cumulative" else None
        is_finished = False
        try:
            for sequence in submission.sequences:
                self._cores.add(sequence)
            while not is_finished:
                item = await own.queue.get()
                if isinstance(item, ShardwrightError):
                    raise item
                is_finished = item.finished
                if cumulative is None:
                    yield item
                else:
                    cumulative.add(item)
                    yield cumulative.output
        finally:
            self._streams.pop(submission.request_id, None)
            if not is_finished:
                self._abort_in_core(self._frontend.abort(submission.request_id))

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingOutput]:
        """Embed texts, with a model that was started for it. Cancelling forgets those not read yet.

        Args:
            prompts: as for `generate`; one, or many.
            dimensions: cut embeddings to so many numbers, if the model was trained for that.
            truncate_prompt_tokens: read the beginning of longer texts; -1: as much as the model reads.

        Returns: one output per text, in order.
        Raises: RequestError if the model does not embed or a text is wrong; EngineDeadError when no core is left.
        """
        job = self._pooling.embed(prompts, dimensions=dimensions, truncate_prompt_tokens=truncate_prompt_tokens)
        return await self._pool(job)

    async def classify(
        self, prompts: Prompt | Sequence[Prompt], *, truncate_prompt_tokens: int | None = None
    ) -> list[ClassificationOutput]:
        """Classify texts, with a model that has a head for it. As `embed` otherwise."""
        return await self._pool(self._pooling.classify(prompts, truncate_prompt_tokens=truncate_prompt_tokens))

    async def score(
        self,
        text_1: Prompt | Sequence[Prompt],
        text_2: Prompt | Sequence[Prompt] | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoreOutput]:
        """One number per text or per pair of texts, as `LLM.score` has them. As `embed` otherwise."""
        return await self._pool(self._pooling.score(text_1, text_2, truncate_prompt_tokens=truncate_prompt_tokens))

    async def _pool(self, job: PoolingJob[PoolingResult]) -> list[PoolingResult]:
        if self._error is not None:
            raise self._error
        self._receiver.start()
        loop = asyncio.get_running_loop()
        futures: dict[str, asyncio.Future[bytes]] = {one.request_id: loop.create_future() for one in job.requests}
        self._futures |= futures
        try:
            self._cores.pool(job.requests)
            values = await asyncio.gather(*futures.values())
            return job.outputs(dict(zip(futures, values, strict=True)))
        finally:
            unread = [request_id for request_id, future in futures.items() if future.cancelled()]
            for request_id in futures:
                del self._futures[request_id]
            self._abort_in_core(unread)

    async def abort(self, request_id: str) -> None:
        """End a request. Its stream ends with finish reason "abort"; unknown ids are ignored."""
        if (stream := self._streams.get(request_id)) is not None:
            self._abort_in_core(stream.sequence_ids)
            self._hand_out(self._frontend.cut_short(stream.sequence_ids))

    async def reset_prefix_cache(self) -> None:
        """Forget cached prefixes."""
        self._cores.reset_prefix_cache()

    def close(self) -> None:
        """End the core processes. Running streams end with EngineDeadError."""
        self._fail(EngineDeadError("the engine was closed"))
        self._receiver.close()
        self._cores.close()

    def _take(self, outputs: EngineOutputs) -> None:
        """Hand out what a step brought."""
        processed = self._frontend.process(outputs)
        self._abort_in_core(processed.abort_ids)
        self._hand_out(processed)
        for pooled in outputs.pooled:
            future = self._futures.get(pooled.request_id)
            if future is not None and not future.done():
                future.set_result(pooled.values)

    def _hand_out(self, processed: ProcessedOutputs) -> None:
        for output in processed.request_outputs:
            if (stream := self._streams.get(output.request_id)) is not None:
                stream.queue.put_nowait(output)

    def _fail(self, error: ShardwrightError) -> None:
        """Tell everyone, once, that nothing more will come."""
        if self._error is None:
            self._error = error
            for stream in self._streams.values():
                stream.queue.put_nowait(error)
            for future in self._futures.values():
                if not future.done():
                    future.set_exception(error)

    def _abort_in_core(self, sequence_ids: list[str]) -> None:
        if sequence_ids and self._error is None:
            self._cores.abort(sequence_ids)
