"""Text to tokens and back, conversations, and directories without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.errors import ModelSourceError, RequestError
from shardwright.models.tokenizer import Tokenizer, load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hello"}]


def save_tokenizer(directory: Path, **options: Any) -> Path:
    """A byte-level tokenizer that puts <s> before every text, as Llama's does."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)  # type: ignore[no-untyped-call]
    hf_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory, trust_remote_code=False)


def test_facts(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.has_chat_template) == (258, [1], True)


@pytest.mark.parametrize("text", ["", "hello", "naïve café", "日本語", "👩‍👩‍👧 and 😀", "tab\tand\r\nlines", " , . "])
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert token_ids[0] == 0
    assert tokenizer.encode(text, add_special_tokens=False) == token_ids[1:]
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<s>" + text


def test_token_texts_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("so it goes")
    assert "".join(tokenizer.token_text(token_id) for token_id in token_ids) == "<s>so it goes"


@given(token_ids=st.lists(st.integers(0, 300)), skips=st.booleans())
def test_text_is_what_transformers_says(tokenizer: Tokenizer, token_ids: list[int], skips: bool) -> None:
    expected = tokenizer._hf.decode(token_ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(token_ids, skip_special_tokens=skips) == expected


def test_a_class_that_decodes_in_its_own_way_is_asked(directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    class Shouting(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _decode(self, *args: Any, **options: Any) -> str:
            return super()._decode(*args, **options).upper()

    hf_tokenizer = Shouting.from_pretrained(directory)
    tokenizer = Tokenizer(hf_tokenizer)
    assert tokenizer.decode(tokenizer.encode("one two")) == "ONE TWO"


def test_part_of_a_character_has_a_text_too(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_text(token_id) for token_id in tokenizer.encode("é", add_special_tokens=False)] == ["�"] * 2


def test_id_without_a_token_has_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(300) == ""


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="at character 1, half of a surrogate pair") as caught:
        tokenizer.encode("a\ud83d")
    assert caught.value.param == "prompt"


def test_conversation_begins_with_one_bos(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.apply_chat_template(MESSAGES)
    assert token_ids.count(0) == 1
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<s>user: hello\nassistant:"


def test_conversation_can_be_left_open(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.apply_chat_template(
        [*MESSAGES, {"role": "assistant", "content": "Well,"}], add_generation_prompt=False, continue_final_message=True
    )
    assert tokenizer.decode(token_ids) == "user: hello\nassistant: Well,"


def test_template_and_its_variables_can_be_given(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.apply_chat_template(
        MESSAGES, chat_template="{{ mood }}: {{ messages[0].content }}", mood="sad"
    )
    assert tokenizer.decode(token_ids) == "sad: hello"


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (MESSAGES, {"chat_template": "{{ raise_exception('roles must alternate') }}"}),
        (MESSAGES, {"chat_template": "{% if %}"}),
        (MESSAGES, {"chat_template": "{{ messages[0].content + 1 }}"}),
        (MESSAGES, {"continue_final_message": True}),
        (MESSAGES, {"tokenize": True}),
        ([], {"chat_template": "{{ messages[0].content }}"}),
        (None, {}),
    ],
)
def test_template_that_fails_is_the_requests_fault(tokenizer: Tokenizer, messages: Any, options: Any) -> None:
    with pytest.raises(RequestError, match="the chat template does not take these messages: .") as caught:
        tokenizer.apply_chat_template(messages, **options)
    assert caught.value.param == "messages"


def test_tokenizer_without_template_says_so(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path), trust_remote_code=False)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template: complete a plain prompt instead"):
        tokenizer.apply_chat_template(MESSAGES)
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="hi") == tokenizer.encode(
        "hi", add_special_tokens=False
    )


def test_directory_without_tokenizer_names_the_flag(model_directory: Path) -> None:
    with pytest.raises(ModelSourceError, match="has no tokenizer .*: name another with --tokenizer"):
        load_tokenizer(model_directory, trust_remote_code=False)


def test_truncated_tokenizer_is_a_clear_error(directory: Path, tmp_path: Path) -> None:
    whole = (directory / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    (tmp_path / "tokenizer_config.json").write_text((directory / "tokenizer_config.json").read_text())
    with pytest.raises(ModelSourceError, match="cannot load the tokenizer in "):
        load_tokenizer(tmp_path, trust_remote_code=False)


def make_custom_tokenizer(directory: Path) -> Path:
    """A tokenizer whose class lies beside it."""
    (directory / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_tokenizer_with_its_own_code_needs_permission(tmp_path: Path) -> None:
    directory = make_custom_tokenizer(save_tokenizer(tmp_path))
    with pytest.raises(ModelSourceError, match="has its own code: read it, then allow it with --trust-remote-code"):
        load_tokenizer(directory, trust_remote_code=False)
    assert load_tokenizer(directory, trust_remote_code=True).decode([0, 1], skip_special_tokens=False) == "<s></s>"
