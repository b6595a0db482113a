"""For models that came without a tokenizer: token ids go in and out, and there is no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from shardwright.errors import RequestError
from shardwright.models.tokenizer import Encoding, Tokenizer


class NoTokenizer(Tokenizer):
    """A tokenizer that knows no text: it refuses to encode, and decodes to nothing.

    Args:
        model: what messages call the model.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.eos_token_ids = []
        self.vocab_size = 0
        self.has_chat_template = False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raise RequestError."""
        self._refuse("prompt")

    def encode_whole(self, text: str, other: str | None = None, *, max_length: int | None = None) -> Encoding:
        """Raise RequestError."""
        self._refuse("prompt")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """No text."""
        return ""

    def token_text(self, token_id: int) -> str:
        """The id, in a form that is told apart from text: entries of log-probabilities need a name."""
        return f"token_id:{token_id}"

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Raise RequestError."""
        self._refuse("messages")

    def _refuse(self, param: str) -> NoReturn:
        raise RequestError(
            f"{self._model} has no tokenizer: give the prompt as token ids, or name a tokenizer with --tokenizer",
            param=param,
        )
