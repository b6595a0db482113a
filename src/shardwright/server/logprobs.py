"""Log-probabilities in the shapes of the two APIs.

Completions: parallel lists with text offsets; `top_logprobs` maps token text to log-probability, chosen one included.
Chat: one record per token with its bytes; `top_logprobs` holds as many of the likeliest as were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shardwright.outputs import Logprob
from shardwright.server.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

LEAST = -9999.0
"""What OpenAI gives for a token that cannot occur: JSON has no infinity."""

Candidates = dict[int, Logprob]


def clamp(logprob: float) -> float:
    """A number that JSON can hold."""
    return max(logprob, LEAST)


def likeliest(candidates: Candidates) -> list[Logprob]:
    """The candidates, best first."""
    return sorted(candidates.values(), key=lambda candidate: -candidate.logprob)


def completion_logprobs(
    token_ids: Iterable[int],
    candidates: Iterable[Candidates | None],
    *,
    offset: int,
    token_text: Callable[[int], str],
) -> CompletionLogprobs:
    """Parallel lists for some tokens of a choice.

    Args:
        token_ids: the tokens that were chosen, or that stood in the prompt.
        candidates: per token; None for the prompt's first token, which nothing predicts.
        offset: characters of the choice's text before the first of these tokens.
        token_text: the text of a token without candidates.
    """
    logprobs = CompletionLogprobs()
    for token_id, row in zip(token_ids, candidates, strict=True):
        text = row[token_id].decoded_token if row else token_text(token_id)
        logprobs.text_offset.append(offset)
        logprobs.tokens.append(text)
        logprobs.token_logprobs.append(clamp(row[token_id].logprob) if row else None)
        logprobs.top_logprobs.append({c.decoded_token: clamp(c.logprob) for c in likeliest(row)} if row else None)
        offset += len(text)
    return logprobs


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """The logprobs of two stretches of text that follow each other."""
    return CompletionLogprobs(
        first.text_offset + second.text_offset,
        first.token_logprobs + second.token_logprobs,
        first.tokens + second.tokens,
        first.top_logprobs + second.top_logprobs,
    )


def chat_logprobs(token_ids: Iterable[int], candidates: Iterable[Candidates], *, num_top: int) -> ChatLogprobs:
    """Records for some tokens of a choice, each with its `num_top` likeliest alternatives."""
    content = []
    for token_id, row in zip(token_ids, candidates, strict=True):
        top = [TopLogprob(c.decoded_token, clamp(c.logprob), utf8(c.decoded_token)) for c in likeliest(row)[:num_top]]
        chosen = row[token_id]
        content.append(TokenLogprob(chosen.decoded_token, clamp(chosen.logprob), utf8(chosen.decoded_token), top))
    return ChatLogprobs(content)


def utf8(text: str) -> list[int]:
    """The bytes of a token's text."""
    return list(text.encode("utf-8", "replace"))


def prompt_logprobs(rows: Iterable[Candidates | None]) -> PromptLogprobs:
    """The field `prompt_logprobs`, in vLLM's shape: per position an object from token ids to candidates."""
    return [
        None if row is None else {id: PromptLogprob(clamp(c.logprob), c.rank, c.decoded_token) for id, c in row.items()}
        for row in rows
    ]
