"""One completion on its way out: tokens become text, which a stop string may end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardwright.engine.detokenizer import Detokenizer
from shardwright.engine.messages import EngineOutput, TokenLogprobs
from shardwright.engine.stop_strings import StopStrings
from shardwright.outputs import CompletionOutput, FinishReason, Logprob
from shardwright.sampling_params import SamplingParams

if TYPE_CHECKING:
    from shardwright.models.tokenizer import Tokenizer


def readable_logprobs(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """Log-probabilities by token id, with their texts: the chosen token first, then the likeliest in order of rank."""
    ranks = (entry.rank, *range(1, len(entry.token_ids)))
    readable: dict[int, Logprob] = {}
    for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True):
        if token_id not in readable:  # the chosen token is often among the likeliest
            readable[token_id] = Logprob(logprob, rank, tokenizer.token_text(token_id))
    return readable


class Completion:
    """State of one of the `n` completions of a request.

    Args:
        index: its place among the `n`.
        tokenizer: of the model.
        prompt_token_ids: what it goes on from.
        params: of the request.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens, prompt_token_ids=prompt_token_ids
        )
        self._stops = StopStrings(params.stop_strings, include=params.include_stop_str_in_output)
        self._num_tokens = 0
        self._cumulative_logprob = None if params.logprobs is None else 0.0

    def take(self, output: EngineOutput) -> CompletionOutput:
        """Take what a step brought.

        Returns: only what is new. If a stop string is complete, tokens that came after it in the step are left out.
        """
        reason, stop_reason = output.finish_reason, output.stop_reason
        num_tokens, pieces, stop = len(output.new_token_ids), [], None
        # The core stops at a token: end-of-sequence or a stop token, whose text is not shown.
        is_hidden = reason is FinishReason.STOP and not self._params.include_stop_str_in_output
        for place, token_id in enumerate(output.new_token_ids):
            self._num_tokens += 1
            if is_hidden and place == len(output.new_token_ids) - 1:
                break
            may_stop = self._num_tokens >= self._params.min_tokens
            text, stop = self._stops.push(self._detokenizer.push(token_id), may_stop=may_stop)
            pieces.append(text)
            if stop is not None:
                num_tokens = place + 1
                break
        if stop is None and reason is not None:
            text, stop = self._stops.push(self._detokenizer.finish())
            pieces.append(text + self._stops.flush())
        return CompletionOutput(
            index=self._index,
            text="".join(pieces),
            token_ids=output.new_token_ids[:num_tokens],
            finish_reason=reason if stop is None else FinishReason.STOP,
            stop_reason=stop_reason if stop is None else stop,
            logprobs=self._logprobs(output.logprobs, num_tokens),
            cumulative_logprob=self._cumulative_logprob,
        )

    def _logprobs(self, entries: list[TokenLogprobs] | None, num_tokens: int) -> list[dict[int, Logprob]] | None:
        if self._cumulative_logprob is None:
            return None
        kept = (entries or [])[:num_tokens]
        self._cumulative_logprob += sum(entry.logprobs[0] for entry in kept)
        return [readable_logprobs(entry, self._tokenizer) for entry in kept]
