"""LLM: offline generation and embedding, with the engine core in this process, or several of them in others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from shardwright.config import EngineConfig
from shardwright.engine.core import EngineCore
from shardwright.engine.cumulative_output import CumulativeOutput
from shardwright.engine.frontend import Frontend, load_frontend_tokenizer
from shardwright.engine.input_processor import Prompt, as_prompts
from shardwright.engine.messages import EngineInfo, SchedulerStats
from shardwright.engine.pooling_core import PoolingCore
from shardwright.engine.pooling_frontend import PoolingFrontend, PoolingJob
from shardwright.engine.start import Core, early_start, open_core
from shardwright.engine.tasks import check_task
from shardwright.errors import EngineDeadError, RequestError
from shardwright.garbage import collection_paused
from shardwright.models.tokenizer import Tokenizer
from shardwright.outputs import ClassificationOutput, EmbeddingOutput, RequestOutput, ScoreOutput
from shardwright.sampling_params import SamplingParams

if TYPE_CHECKING:
    from shardwright.engine.remote_core import RemoteCore

PoolingResult = TypeVar("PoolingResult")

Messages = list[dict[str, Any]]
"""A conversation as OpenAI's API has it: dicts with `role` and `content`."""


class LLM:
    """A model, ready to generate, embed or classify. All requests of a call run together, as memory and budget allow.

    Args:
        model: a directory, a hub id, `package.module:factory`, a name from `register_model`, or `smollm2-135m`.
        options: the engine's options, named as the CLI's flags with underscores (see `shardwright.config`).

    Raises: UsageError for models, weights and options that do not work.
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
        in_this_process = config.parallel.data_parallel_size == 1
        with collection_paused(), early_start(config) if in_this_process else nullcontext():
            tokenizer = load_frontend_tokenizer(config)
            self._core: Core | RemoteCore | None = open_core(config)
        self.info: EngineInfo = self._core.info
        self._frontend = Frontend(tokenizer, self.info)
        self._pooling = PoolingFrontend(tokenizer, self.info)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._frontend.tokenizer

    @property
    def stats(self) -> SchedulerStats:
        """State of the scheduler after the latest step."""
        return self._live_core.stats

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: texts, lists of token ids, or dicts with `prompt` or `prompt_token_ids`; one of them, or many.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show progress on stderr.

        Returns: one output per prompt, in order.
        Raises: RequestError before anything runs, if one of the requests is wrong.
        """
        prompts = as_prompts(prompts)
        results = [CumulativeOutput() for _ in prompts]
        with _progress(len(prompts), enabled=use_tqdm) as progress:
            for index, delta in self.stream(prompts, sampling_params):
                results[index].add(delta)
                progress.advance(delta)
        return [result.output for result in results]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answer conversations: `generate` on what the model's chat template makes of them.

        Args:
            messages: one conversation, or many.
            sampling_params, use_tqdm: as for `generate`.
            template_kwargs: passed on to Tokenizer.apply_chat_template.

        Raises: RequestError if the tokenizer has no chat template, or it refuses the messages.
        """
        check_task(self.info, "generate")
        conversations: Any = [messages] if not messages or isinstance(messages[0], dict) else messages
        prompts: list[Prompt] = [
            {"prompt_token_ids": self.tokenizer.apply_chat_template(conversation, **template_kwargs)}
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Complete prompts and yield what is new, as steps bring it.

        Leaving the loop early aborts what has not ended.

        Yields: (index of the prompt, output with only the new text, tokens and log-probabilities).
        Raises: as `generate`.
        """
        check_task(self.info, "generate")
        core = self._live_core
        assert not isinstance(core, PoolingCore)
        prompts = as_prompts(prompts)
        params = _for_each(sampling_params, len(prompts))
        index_of: dict[str, int] = {}
        try:
            submissions = []
            for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
                submission = self._frontend.submit(prompt, own)
                index_of[submission.request_id] = index
                submissions.append(submission)
            for submission in submissions:
                for sequence in submission.sequences:
                    core.add(sequence)
            while core.has_work:
                processed = self._frontend.process(core.step())
                for sequence_id in processed.abort_ids:
                    core.abort(sequence_id)
                for output in processed.request_outputs:
                    index = index_of[output.request_id]
                    if output.finished:
                        del index_of[output.request_id]
                    yield index, output
        finally:
            for request_id in index_of:
                for sequence_id in self._frontend.abort(request_id):
                    core.abort(sequence_id)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingOutput]:
        """Embed texts, with a model that was started for it.

        Args:
            prompts: as for `generate`.
            dimensions: cut embeddings to so many numbers, if the model was trained for that.
            truncate_prompt_tokens: read the beginning of longer texts; -1: as much as the model reads.
            use_tqdm: show progress on stderr.

        Returns: one output per text, in order.
        Raises: RequestError before anything runs, if the model does not embed or a text is wrong.
        """
        job = self._pooling.embed(prompts, dimensions=dimensions, truncate_prompt_tokens=truncate_prompt_tokens)
        return self._pool(job, use_tqdm=use_tqdm)

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[ClassificationOutput]:
        """Classify texts, with a model that has a head for it. Arguments as for `embed`."""
        job = self._pooling.classify(prompts, truncate_prompt_tokens=truncate_prompt_tokens)
        return self._pool(job, use_tqdm=use_tqdm)

    def score(
        self,
        text_1: Prompt | Sequence[Prompt],
        text_2: Prompt | Sequence[Prompt] | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoreOutput]:
        """One number per text or per pair of texts, with a classifier of a single label; per pair, with an embedder.

        Args:
            text_1: texts whose logit is the score, as with reward models; or the first texts of pairs, such as queries.
            text_2: the second texts; as many as first ones, or one first text for all. The score of a pair is the
                sigmoid of the logit, unless the model's config has another rule; the cosine of both embeddings, if the
                model embeds.
            truncate_prompt_tokens, use_tqdm: as for `embed`.

        Raises: RequestError before anything runs, if the model does not score or a text is wrong.
        """
        job = self._pooling.score(text_1, text_2, truncate_prompt_tokens=truncate_prompt_tokens)
        return self._pool(job, use_tqdm=use_tqdm)

    def _pool(self, job: PoolingJob[PoolingResult], *, use_tqdm: bool) -> list[PoolingResult]:
        core = self._live_core
        assert not isinstance(core, EngineCore)
        values: dict[str, bytes] = {}
        try:
            for request in job.requests:
                core.add(request)
            with _bar("texts", len(job.requests), enabled=use_tqdm) as bar:
                while core.has_work:
                    pooled = core.step().pooled
                    values |= {one.request_id: one.values for one in pooled}
                    bar.update(len(pooled))
        finally:
            for request in job.requests:
                core.abort(request.request_id)
        return job.outputs(values)

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes, for measurements that must not profit from earlier ones."""
        self._live_core.reset_prefix_cache()

    def close(self) -> None:
        """End what the engine has started, and free the model and its cache. It cannot be used afterwards."""
        if self._core is not None:
            self._core.close()
        self._core = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _live_core(self) -> Core | RemoteCore:
        if self._core is None:
            raise EngineDeadError("the engine is closed: make a new LLM")
        return self._core


class _progress:
    """A bar of finished requests on stderr, with output tokens per second."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar = _bar("requests", total, enabled=enabled)
        self._num_tokens = 0

    def advance(self, delta: RequestOutput) -> None:
        self._num_tokens += sum(len(output.token_ids) for output in delta.outputs)
        if delta.finished:
            elapsed = self._bar.format_dict["elapsed"] or 1e-9
            self._bar.set_postfix_str(f"{self._num_tokens / elapsed:.1f} tok/s", refresh=False)
            self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _bar(what: str, total: int, *, enabled: bool) -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, desc=what, disable=not enabled, dynamic_ncols=True)


def _for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{count} prompts but {len(params)} sampling_params: give one for all, or one for each")
    return params
