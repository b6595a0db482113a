"""Deltas of a request put together."""

from __future__ import annotations

import dataclasses

from shardwright.outputs import CompletionOutput, Logprob, RequestOutput


class CumulativeOutput:
    """Collects the deltas of one request. Adding one costs what it holds; `output` costs what has come together."""

    def __init__(self) -> None:
        self._last: RequestOutput | None = None
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._pieces: dict[int, list[str]] = {}
        self._completions: dict[int, CompletionOutput] = {}

    def add(self, delta: RequestOutput) -> None:
        """Take the next delta."""
        self._last = delta
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        for new in delta.outputs:
            self._pieces.setdefault(new.index, []).append(new.text)
            known = self._completions.get(new.index)
            if known is None:
                self._completions[new.index] = _copy(new)
                continue
            known.token_ids += new.token_ids
            if known.logprobs is not None:
                known.logprobs += new.logprobs or []
            known.finish_reason, known.stop_reason = new.finish_reason, new.stop_reason
            known.cumulative_logprob = new.cumulative_logprob

    @property
    def output(self) -> RequestOutput:
        """All that came so far, by index of the completion; later deltas do not change what was returned.

        Raises: ValueError before the first delta.
        """
        if self._last is None:
            raise ValueError("no delta was added yet")
        for index, completion in self._completions.items():
            pieces = self._pieces[index]
            pieces[:] = ["".join(pieces)]
            completion.text = pieces[0]
        completions = [_copy(self._completions[index]) for index in sorted(self._completions)]
        return dataclasses.replace(self._last, outputs=completions, prompt_logprobs=self._prompt_logprobs)


def _copy(completion: CompletionOutput) -> CompletionOutput:
    """A copy that shares no list."""
    logprobs = None if completion.logprobs is None else list(completion.logprobs)
    return dataclasses.replace(completion, token_ids=list(completion.token_ids), logprobs=logprobs)
