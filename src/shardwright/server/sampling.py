"""From a request body to `SamplingParams`."""

from __future__ import annotations

from typing import Any

from shardwright.errors import RequestError
from shardwright.sampling_params import SamplingParams
from shardwright.server.schemas import GenerationBody

SHARED_FIELDS = tuple(name for name in SamplingParams.__struct_fields__ if name in GenerationBody.model_fields)
"""Fields that have the same name and meaning in a body and in `SamplingParams`."""


def sampling_params(body: GenerationBody, **overrides: Any) -> SamplingParams:
    """The body's sampling fields, null ones left at their defaults.

    Args:
        body: of either generation endpoint.
        overrides: fields that mean something else in the body; these win, None included.

    Raises: RequestError naming the field that is out of range, or that contradicts another.
    """
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "stream_options is only for streams: set stream to true, or leave it out", param="stream_options"
        )
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs is not for streams: set stream to false", param="prompt_logprobs")
    given = {name: value for name in SHARED_FIELDS if (value := getattr(body, name)) is not None}
    return SamplingParams(**(given | overrides))
