"""How the tokens of one request are chosen, and when it ends."""

from __future__ import annotations

from typing import Any

import msgspec

from shardwright.errors import RequestError

MAX_LOGPROBS = 100
"""Most alternatives per token that `logprobs` and `prompt_logprobs` may ask for."""

MAX_COMPLETIONS = 128
"""Largest `n`: every completion is a sequence of its own in the scheduler."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling and stopping of one request, under the names that vLLM and OpenAI use.

    Attributes:
        n: number of completions of the prompt.
        temperature: 0 is greedy; else logits are divided by it.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this, in (0, 1].
        top_k: keep this many of the likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest, in [0, 1].
        seed: makes sampling reproducible, whatever else runs beside it. Completion `i` of `n` uses `seed + i`.
        max_tokens: most tokens to generate; None is as many as the model's length allows.
        min_tokens: end-of-sequence and stop tokens are suppressed until this many tokens exist.
        stop: strings that end the output; not part of it unless `include_stop_str_in_output`.
        stop_token_ids: tokens that end the output; the token is part of `token_ids`, its text is not shown.
        ignore_eos: go on past the end-of-sequence token.
        presence_penalty: taken off the logit of every token generated so far, in [-2, 2].
        frequency_penalty: taken off per occurrence among the generated tokens, in [-2, 2].
        repetition_penalty: divides (multiplies, if negative) the logits of tokens in prompt and output; over 0.
        logit_bias: token id to what is added to its logit, in [-100, 100].
        logprobs: return the log-probabilities of this many likeliest tokens beside the chosen one's.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string (or the stop token's text) in the text.

    Raises: RequestError if a value is out of range or two contradict each other.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self)

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def of_completion(self, index: int) -> SamplingParams:
        """The parameters of completion `index` of `n`: alone, with its own seed."""
        seed = None if self.seed is None else self.seed + index
        return msgspec.structs.replace(self, n=1, seed=seed)


_INTEGERS = ("n", "top_k", "min_tokens")
_OPTIONAL_INTEGERS = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def check_types(params: SamplingParams) -> None:
    """Refuse values of the wrong type: Python callers get no checking from msgspec."""
    for name in (*_INTEGERS, *_OPTIONAL_INTEGERS):
        value: Any = getattr(params, name)
        if value is None and name in _OPTIONAL_INTEGERS:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise RequestError(f"{name} must be an integer, got {value!r}", param=name)
    for name in _NUMBERS:
        value = getattr(params, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
            raise RequestError(f"{name} must be a number, got {value!r}", param=name)
    if any(not isinstance(text, str) or not text for text in params.stop_strings):
        raise RequestError(f"stop must hold non-empty strings, got {params.stop!r}", param="stop")
    if any(not isinstance(token, int) or token < 0 for token in params.stop_token_ids or []):
        raise RequestError(f"stop_token_ids must hold token ids, got {params.stop_token_ids!r}", param="stop_token_ids")


def check_ranges(params: SamplingParams) -> None:
    """Refuse values out of range and contradictions. Raises RequestError naming the field."""
    limits: list[tuple[str, bool, str]] = [
        ("n", 1 <= params.n <= MAX_COMPLETIONS, f"from 1 to {MAX_COMPLETIONS}"),
        ("temperature", 0 <= params.temperature <= 100, "from 0 (greedy) to 100"),
        ("top_p", 0 < params.top_p <= 1, "over 0 and at most 1"),
        ("top_k", -1 <= params.top_k < 2**31, "at least 1, or 0 or -1 for no limit"),
        ("min_p", 0 <= params.min_p <= 1, "from 0 to 1"),
        ("seed", params.seed is None or -(2**63) <= params.seed < 2**63, "a 64-bit integer"),
        ("max_tokens", params.max_tokens is None or params.max_tokens >= 1, "at least 1"),
        ("min_tokens", params.min_tokens >= 0, "at least 0"),
        ("presence_penalty", -2 <= params.presence_penalty <= 2, "from -2 to 2"),
        ("frequency_penalty", -2 <= params.frequency_penalty <= 2, "from -2 to 2"),
        ("repetition_penalty", 0 < params.repetition_penalty <= 100, "over 0 and at most 100"),
        ("logprobs", params.logprobs is None or 0 <= params.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
        (
            "prompt_logprobs",
            params.prompt_logprobs is None or 0 <= params.prompt_logprobs <= MAX_LOGPROBS,
            f"from 0 to {MAX_LOGPROBS}",
        ),
    ]
    for name, holds, rule in limits:
        if not holds:
            raise RequestError(f"{name} is {getattr(params, name)} but must be {rule}", param=name)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, more than max_tokens, which is {params.max_tokens}", param="min_tokens"
        )
    if params.is_greedy and params.n > 1:
        raise RequestError(
            f"n is {params.n} but temperature 0 gives the same completion each time: raise the temperature", param="n"
        )
    for token, bias in (params.logit_bias or {}).items():
        if not isinstance(token, int) or token < 0 or not -100 <= bias <= 100:
            raise RequestError(
                f"logit_bias maps token ids to numbers from -100 to 100, got {token!r}: {bias!r}", param="logit_bias"
            )
