"""Request bodies, as OpenAI and vLLM define them.

Checked strictly: no string passes for a number, and no unknown field passes at all. Null means the default everywhere.
Ranges of sampling values are checked by `SamplingParams`, where their meaning is documented. What OpenAI knows and this
server does not do is declared too, as `Unsupported`, so that the error can say so; what changes nothing is `Ignored`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import PydanticCustomError


def expected(rule: str) -> WrapValidator:
    """One message for a union of types, in place of one per member."""

    def check(value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("expected", "must be {rule}", {"rule": rule}) from None

    return WrapValidator(check)


def only(*harmless: Any) -> AfterValidator:
    """Refuse every value but null, empty ones and those that ask for nothing beyond what the server does."""

    def check(value: Any) -> Any:
        if value and not any(value == allowed for allowed in harmless):
            raise PydanticCustomError("refused", "is not supported by this server: leave it out")
        return value

    return AfterValidator(check)


Unsupported = Annotated[Any, only(), Field(exclude=True)]
Ignored = Annotated[Any, Field(exclude=True)]

TextInput = Annotated[
    str | list[str] | list[int] | list[list[int]],
    expected("a string, a list of strings, a list of token ids or a list of lists of token ids"),
]


class StrictModel(BaseModel):
    """Every object in a request."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(StrictModel):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None


class GenerationBody(StrictModel):
    """What both generation endpoints take. The sampling fields are documented at `SamplingParams`."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Annotated[str | list[str] | None, expected("a string or a list of strings")] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    user: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None


class CompletionBody(GenerationBody):
    """Body of `POST /v1/completions`."""

    prompt: TextInput
    logprobs: int | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None

    best_of: Annotated[Any, only(1), Field(exclude=True)] = None
    suffix: Unsupported = None


class TextPart(StrictModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class InputMessage(StrictModel):
    """One turn. Fields of an answer that carry nothing here may be sent back with it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | list[TextPart] | None,
        expected('a string or a list of {"type": "text", "text": ...} parts: this server reads text only'),
    ] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    refusal: Ignored = None
    annotations: Ignored = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it: text parts joined by newlines, developers heard as the system."""
        parts = self.content if isinstance(self.content, list) else None
        message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "\n".join(part.text for part in parts) if parts is not None else self.content or "",
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        return {name: value for name, value in message.items() if value is not None}


class ConversationFields(StrictModel):
    """How messages become a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(GenerationBody, ConversationFields):
    """Body of `POST /v1/chat/completions`."""

    messages: list[InputMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None

    response_format: Annotated[Any, only({"type": "text"}), Field(exclude=True)] = None
    modalities: Annotated[Any, only(["text"]), Field(exclude=True)] = None
    tool_choice: Annotated[Any, only("none", "auto"), Field(exclude=True)] = None
    parallel_tool_calls: Ignored = None
    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Annotated[Any, only("none"), Field(exclude=True)] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None


class PoolingBody(StrictModel):
    """What all take that read whole texts."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    user: Ignored = None


class ClassifyBody(PoolingBody):
    """Body of `POST /classify`."""

    input: TextInput


class ScoreBody(PoolingBody):
    """Body of `POST /score`: texts, or pairs of texts."""

    text_1: TextInput
    text_2: TextInput | None = None


class Document(StrictModel):
    """A text, as Jina's API may have it."""

    text: str


class RerankBody(PoolingBody):
    """Body of `POST /rerank`, as Jina and Cohere define it."""

    query: str
    documents: Annotated[list[str | Document], expected("a list of strings, or of objects with a text")]
    top_n: int | None = None
    return_documents: bool | None = None


class EmbeddingBody(PoolingBody):
    """Body of `POST /v1/embeddings`."""

    input: TextInput
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class TokenizeBody(ConversationFields):
    """Body of `POST /tokenize`: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[InputMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(StrictModel):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[int]
