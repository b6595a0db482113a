"""Small tokenizers of the kinds that models come with."""

from __future__ import annotations

import string
from functools import cache

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shardwright.models.tokenizer import Tokenizer

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]  # ids 0 to 3
EOS = 2
STRADDLING = b"\x82\xac\xe2"
LONGER_PIECES = [
    *(text.encode() for text in ("\u20ac", "\u65e5\u672c", " the", "\U0001f600")),
    *(STRADDLING, b"\xe6\x97", b"\xa5\xe6", b"\x9c\xac\xe6", b"\x9f\x98", b"\xff\xff\xff\xff\xff", b"a\xe2"),
]
"""Of `byte_tokenizer`: words, and parts of words that begin or end within characters."""
STRADDLING_ID = 260 + LONGER_PIECES.index(STRADDLING)


def byte_letters() -> list[str]:
    """GPT-2's letters for the bytes 0 to 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def wrap(backend: Backend) -> Tokenizer:
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    )


@cache
def byte_tokenizer() -> Tokenizer:
    """Byte-level as GPT-2's: byte `b` has the id `4 + b`; then come longer tokens."""
    letters = byte_letters()
    words = [*SPECIAL_TOKENS, *letters, *("".join(letters[byte] for byte in piece) for piece in LONGER_PIECES)]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrap(backend)


def byte_ids(data: bytes) -> list[int]:
    """Ids of single bytes in `byte_tokenizer` and `sentencepiece_tokenizer`."""
    return [len(SPECIAL_TOKENS) + byte for byte in data]


def token_bytes(token_id: int, *, skip_special_tokens: bool) -> bytes:
    """What a token of `byte_tokenizer` stands for."""
    special = [b"" if skip_special_tokens else token.encode() for token in SPECIAL_TOKENS]
    return [*special, *(bytes([byte]) for byte in range(256)), *LONGER_PIECES][token_id]


@cache
def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: words begin with a visible space, unknown characters are bytes, a leading space is stripped."""
    words = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *string.ascii_letters, ".", ","]
    merges = [("\u2581", "t"), ("\u2581t", "o"), ("\u2581", "a"), ("h", "i")]
    words += ["".join(merge) for merge in merges]
    backend = Backend(
        models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(backend)


@cache
def metaspace_tokenizer() -> Tokenizer:
    """As T5's: the space before the first word is no text."""
    words = [*SPECIAL_TOKENS, "\u2581", *string.ascii_letters, "\u2581an", "\u2581t", "\u2581\u2581"]
    backend = Backend(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return wrap(backend)


@cache
def wordpiece_tokenizer() -> Tokenizer:
    """As BERT's: pieces that go on a word begin with ##."""
    words = [*SPECIAL_TOKENS, "un", "##break", "##able", "glass", "a", "##s"]
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return wrap(backend)
