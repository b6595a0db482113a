"""Text to token ids and back: one face for every tokenizer that Transformers can load. Knows nothing of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shardwright.errors import ModelSourceError, RequestError
from shardwright.foreign_imports import postpone_compiler
from shardwright.models.resolve import resolve_directory

_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Encoding:
    """Tokens of a text or of a pair."""

    token_ids: list[int]
    token_type_ids: list[int] | None
    """Which text each token belongs to; None if the model does not ask, or all belong to the first."""


class Tokenizer:
    """Wraps a Transformers tokenizer, which it never changes.

    Args:
        hf_tokenizer: a `PreTrainedTokenizerBase`, fast or slow.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self._decode = _decoding(hf_tokenizer)
        self._token_texts: dict[int, str] = {}
        eos = hf_tokenizer.eos_token_id
        self.eos_token_ids: list[int] = [] if eos is None else [eos]
        self.vocab_size: int = len(hf_tokenizer)
        """Number of tokens that have a text; the model's table may be longer."""
        self.has_chat_template: bool = bool(hf_tokenizer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that the tokenizer puts around a sequence unless told not to.

        Raises: RequestError if the text is not valid Unicode.
        """
        check_unicode(text)
        token_ids: list[int] = self._hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return token_ids

    def encode_whole(self, text: str, other: str | None = None, *, max_length: int | None = None) -> Encoding:
        """A text, or a pair of them, as a model reads it that was trained on whole texts.

        Args:
            text: first or only one.
            other: second one.
            max_length: cut what is longer, tokens around the sequence kept.

        Raises: RequestError if a text is not valid Unicode, or `max_length` leaves nothing of it.
        """
        for one in (text, *([] if other is None else [other])):
            check_unicode(one)
        try:
            encoded = self._hf(text, other, truncation=max_length is not None, max_length=max_length, verbose=False)
        except Exception as exc:  # of either kind of tokenizer
            raise RequestError(f"the text cannot be cut to {max_length} tokens: {exc}", param="prompt") from exc
        types = encoded.get("token_type_ids")
        return Encoding(encoded["input_ids"], types if types and any(types) else None)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that form no character become U+FFFD. Spaces are left as the tokens have them."""
        return self._decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text that a token adds within a sequence, special tokens included; for log-probabilities."""
        text = self._token_texts.get(token_id)
        if text is None:
            # A token at the start may lose its leading space; a second one shows the text it has within a sequence.
            once = self.decode([token_id], skip_special_tokens=False)
            twice = self.decode([token_id, token_id], skip_special_tokens=False)
            text = twice[len(once) :] if twice.startswith(once) else once
            self._token_texts[token_id] = text
        return text

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: as in OpenAI's API: `role`, `content`, and whatever else the template reads.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, for the model to go on with it.
            chat_template: a Jinja template to use in place of the tokenizer's.
            kwargs: variables for the template, such as `tools`.

        Raises: RequestError if there is no template, or it does not take these messages.
        """
        if chat_template is None and not self.has_chat_template:
            raise RequestError(
                "the model's tokenizer has no chat template: complete a plain prompt instead, or give a chat template",
                param="messages",
            )
        try:
            text = self._hf.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                **kwargs,
            )
        except Exception as exc:  # a template is somebody's code: anything may come out of it
            reason = str(exc).strip() or type(exc).__name__
            raise RequestError(f"the chat template does not take these messages: {reason}", param="messages") from exc
        # The template has written the special tokens, so the tokenizer must not add its own.
        return self.encode(text, add_special_tokens=False)


def check_unicode(text: str) -> None:
    """Raise RequestError if a text holds half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise RequestError(
            f"the text has {text[exc.start]!r} at character {exc.start}, half of a surrogate pair, which is no "
            "Unicode text: send valid UTF-8",
            param="prompt",
        ) from exc


def _decoding(hf_tokenizer: Any) -> Callable[..., str]:
    """What turns a list of token ids into text: the library beneath by itself, unless the class has a way of its own.

    It is called for every token, and takes a third of the time that it takes through Transformers.
    """
    if getattr(hf_tokenizer, "is_fast", False):
        from transformers import PreTrainedTokenizerFast as Fast

        kind = type(hf_tokenizer)
        if issubclass(kind, Fast) and (kind.decode, kind._decode) == (Fast.decode, Fast._decode):
            decode: Callable[..., str] = hf_tokenizer.backend_tokenizer.decode
            return decode
    return partial(hf_tokenizer.decode, clean_up_tokenization_spaces=False)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a directory, a hub repository or the starter model.

    Args:
        path: as the `model` of `resolve_model`, but without need for a config.json.
        trust_remote_code: run a tokenizer class that lies in the directory.
        revision: branch, tag or commit of a hub repository.

    Raises: ModelSourceError if there is none, it cannot be read, or it needs `trust_remote_code`.
    """
    directory = resolve_directory(str(path), revision=revision, weights=False)
    postpone_compiler()  # Transformers' tokenizers import half of its modeling code
    from transformers import AutoTokenizer

    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as exc:  # readers of many formats, each with errors of its own
        if trust_remote_code and (directory / "config.json").is_file():
            from shardwright.models.build import load_config  # comes with PyTorch

            load_config(directory, trust_remote_code=True)  # fails if it is the model's own code that cannot be loaded
        raise ModelSourceError(_no_tokenizer(directory, exc, trust_remote_code)) from exc
    return Tokenizer(hf_tokenizer)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has any file of a tokenizer."""
    return any((directory / name).is_file() for name in _FILES) or any(directory.glob("*.tiktoken"))


def _no_tokenizer(directory: Path, exc: Exception, trust_remote_code: bool) -> str:
    reason = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
    if not trust_remote_code and "trust_remote_code" in str(exc):
        return f"the tokenizer in {directory} has its own code: read it, then allow it with --trust-remote-code"
    if not has_tokenizer(directory):
        names = ", ".join(_FILES[:3])
        return f"{directory} has no tokenizer (no {names} or the like): name another with --tokenizer"
    return f"cannot load the tokenizer in {directory}: {reason}"
