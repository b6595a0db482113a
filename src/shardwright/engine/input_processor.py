"""From what a caller hands in to the sequences that the engine core runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, cast

import msgspec

from shardwright.engine.messages import EngineRequest
from shardwright.errors import PromptTooLongError, RequestError
from shardwright.sampling_params import SamplingParams

if TYPE_CHECKING:
    from shardwright.models.tokenizer import Tokenizer


class TextPrompt(TypedDict):
    """A prompt to be tokenized."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt in token ids."""

    prompt_token_ids: list[int]


Prompt: TypeAlias = str | Sequence[int] | TextPrompt | TokensPrompt | Mapping[str, Any]
"""What may be completed; a mapping has the one key of TextPrompt or TokensPrompt."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one or many; a list of integers is one."""
    is_one = isinstance(prompts, (str, Mapping)) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [cast("Prompt", prompts)] if is_one else list(cast("Sequence[Prompt]", prompts))


def prompt_text(prompt: Prompt) -> str | None:
    """The text of a prompt; None if it is in token ids."""
    value = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return value if isinstance(value, str) else None


class InputProcessor:
    """Checks requests and makes one engine request for each completion.

    Args:
        tokenizer: of the model.
        vocab_size: number of tokens that the model has embeddings for.
        max_model_len: most tokens of prompt and output together.
        eos_token_ids: tokens that end an output, of the generation config and of the tokenizer.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, max_model_len: int, eos_token_ids: Iterable[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos_token_ids = sorted(set(eos_token_ids))

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        arrival_time: float = 0.0,
        priority: int = 0,
    ) -> list[EngineRequest]:
        """Engine requests of the completions, in order.

        A single one has the id of the request, several have ids of their own.
        Only the first completion computes the prompt's log-probabilities: they are the same for all.

        Raises: RequestError naming the field at fault; PromptTooLongError if the prompt leaves no room for output.
        """
        self._check_params(params)
        token_ids = self._token_ids(prompt)
        params = self._with_room(params, len(token_ids))
        requests = []
        for index in range(params.n):
            own = params.of_completion(index)
            if index and own.prompt_logprobs is not None:
                own = msgspec.structs.replace(own, prompt_logprobs=None)
            requests.append(
                EngineRequest(
                    request_id=request_id if params.n == 1 else f"{request_id}-{index}",
                    prompt_token_ids=token_ids,
                    sampling_params=own,
                    eos_token_ids=[] if params.ignore_eos else self._eos_token_ids,
                    arrival_time=arrival_time,
                    priority=priority,
                )
            )
        return requests

    def _token_ids(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt in any form. Raises RequestError if it is none, or has none or unknown ones."""
        value = read_prompt(prompt)
        token_ids = self._tokenizer.encode(value) if isinstance(value, str) else value
        check_token_ids(token_ids, self._vocab_size)
        return token_ids

    def _check_params(self, params: SamplingParams) -> None:
        """Refuse what only the model can tell is wrong."""
        for name, token_ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token_id in token_ids or ():
                if token_id >= self._vocab_size:
                    raise RequestError(
                        f"{name} names token id {token_id}, but the model's ids go from 0 to {self._vocab_size - 1}",
                        param=name,
                    )
        for stop in params.stop_strings:
            try:
                stop.encode("utf-8")
            except UnicodeEncodeError as exc:
                raise RequestError(
                    f"stop has half of a surrogate pair in {stop!r}, which is no Unicode text", param="stop"
                ) from exc

    def _with_room(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """Parameters with `max_tokens` set to what was asked for or fits, whichever is less."""
        room = self._max_model_len - num_prompt_tokens
        if room < 1:
            raise PromptTooLongError(
                f"prompt has {num_prompt_tokens:,} tokens but max_model_len is {self._max_model_len:,}, output "
                "included: shorten it, or start with a larger --max-model-len if the model allows one",
                param="prompt",
            )
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens is {params.min_tokens:,} but after a prompt of {num_prompt_tokens:,} tokens only {room:,} "
                f"fit into max_model_len, which is {self._max_model_len:,}",
                param="min_tokens",
            )
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        return params if max_tokens == params.max_tokens else msgspec.structs.replace(params, max_tokens=max_tokens)


def read_prompt(prompt: Prompt) -> str | list[int]:
    """The text of a prompt in any form, or its token ids. Raises RequestError if it is neither."""
    value = _unwrap(prompt)
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return _integers(value)
    raise RequestError(
        f"a prompt is a string, a list of token ids, or a dict with one of them, not {type(value).__name__}",
        param="prompt",
    )


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise RequestError if a prompt has no tokens, or unknown ones."""
    if not token_ids:
        raise RequestError("the prompt is empty: it needs at least one token", param="prompt")
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"the prompt holds token id {token_id}, but the model's ids go from 0 to {vocab_size - 1}",
                param="prompt",
            )


def _unwrap(prompt: Prompt) -> object:
    """What a prompt given as a dict holds; other prompts as they are."""
    if not isinstance(prompt, Mapping):
        return prompt
    known = ("prompt", "prompt_token_ids")
    if unknown := [key for key in prompt if key not in known]:
        raise RequestError(f"a prompt has no {unknown[0]!r}: give prompt or prompt_token_ids", param="prompt")
    if len(prompt) != 1:
        raise RequestError("a prompt given as a dict has either prompt or prompt_token_ids", param="prompt")
    key, value = next(iter(prompt.items()))
    if isinstance(value, str) != (key == "prompt"):
        raise RequestError(
            f"{key} is {value!r} but must be {'a string' if key == 'prompt' else 'a list of token ids'}", param=key
        )
    return value


def _integers(token_ids: Sequence[Any]) -> list[int]:
    for token_id in token_ids:
        if not isinstance(token_id, Integral) or isinstance(token_id, bool):
            raise RequestError(
                f"the prompt holds {token_id!r}, but token ids are integers, and a list of prompts is not one prompt",
                param="prompt",
            )
    return [int(token_id) for token_id in token_ids]
