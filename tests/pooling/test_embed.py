"""Embeddings equal to a plain forward pass of the model and pooling by hand, alone and batched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import build_tokenizer
from tests.pooling.models import (
    bert_config,
    gte_config,
    llama_config,
    roberta_config,
    save,
    t5_config,
    write_sentence_files,
)
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    BertForMaskedLM,
    BertModel,
    GteModel,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    RobertaModel,
    T5EncoderModel,
    T5Model,
)

from shardwright import LLM
from shardwright.errors import CheckpointError, ConfigError, PromptTooLongError, RequestError, UnsupportedModelError

TEXTS = ["a", "Once upon a time", "the sea, the sea", "x" * 40, "xy" * 20, "?!"]


def hidden_states(model: PreTrainedModel, text: str) -> Tensor:
    """The plain pass over one text: [L, hidden_size]."""
    with torch.inference_mode():
        return model(torch.tensor([build_tokenizer()(text)["input_ids"]])).last_hidden_state[0]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


POOL: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
    "last": lambda hidden: hidden[-1],
}


def embed(path: Path, texts: Any = TEXTS, *, one_by_one: bool = False, **options: Any) -> np.ndarray[Any, Any]:
    with LLM(str(path), **options) as llm:
        if one_by_one:
            outputs = [llm.embed(text, use_tqdm=False)[0] for text in texts]
        else:
            outputs = llm.embed(texts, use_tqdm=False)
    return np.array([output.embedding for output in outputs], dtype=np.float32)


MODELS = {
    "bert": (BertModel, bert_config(), "mean"),
    "bert-with-a-head": (BertForMaskedLM, bert_config(), "mean"),
    "roberta": (RobertaModel, roberta_config(), "mean"),
    "llama": (LlamaModel, llama_config(), "last"),
    "t5": (T5EncoderModel, t5_config(), "mean"),
    "t5-with-a-decoder": (T5Model, t5_config(), "mean"),
    "gte": (GteModel, gte_config(), "mean"),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_pass_and_pooling(name: str, tmp_path: Path) -> None:
    kind, config, pooling = MODELS[name]
    save(kind, config, tmp_path)
    plain = AutoModelForTextEncoding if "t5" in name else AutoModel
    plain = plain.from_pretrained(tmp_path).eval()
    expected = np.stack([unit(POOL[pooling](hidden_states(plain, text))).numpy() for text in TEXTS])
    for one_by_one in (False, True):
        np.testing.assert_allclose(embed(tmp_path, one_by_one=one_by_one), expected, atol=1e-5)


def test_small_batches_change_nothing(tmp_path: Path) -> None:
    save(BertModel, bert_config(), tmp_path)
    together = embed(tmp_path)
    np.testing.assert_allclose(embed(tmp_path, max_num_seqs=2, max_num_batched_tokens=30), together, atol=1e-6)


def test_without_the_check_texts_are_read_together_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(BertModel, bert_config(), tmp_path)
    together = embed(tmp_path)
    assert "not verified" not in caplog.text
    np.testing.assert_allclose(embed(tmp_path, self_check=False), together, atol=1e-6)
    assert "was not verified" in caplog.text


@pytest.mark.parametrize("pooling", POOL)
@pytest.mark.parametrize("normalize", [True, False])
def test_options_override_the_default(pooling: str, normalize: bool, tmp_path: Path) -> None:
    model = save(BertModel, bert_config(), tmp_path)
    rows = [POOL[pooling](hidden_states(model, text)) for text in TEXTS]
    expected = torch.stack([unit(row) if normalize else row for row in rows]).numpy()
    np.testing.assert_allclose(embed(tmp_path, pooling=pooling, normalize=normalize), expected, atol=1e-5)


def test_a_causal_lm_embeds_when_asked_to(tmp_path: Path) -> None:
    model = save(LlamaForCausalLM, llama_config(), tmp_path)
    expected = np.stack([unit(hidden_states(model.model, text)[-1]).numpy() for text in TEXTS])
    np.testing.assert_allclose(embed(tmp_path, task="embed"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}}, POOL["cls"]),
        ({"pooling": {"pooling_mode": "lasttoken"}, "then": ("Normalize",)}, lambda h: unit(h[-1])),
        ({"pooling": {"pooling_mode_mean_tokens": True}, "then": ("Dropout", "Normalize")}, lambda h: unit(h.mean(0))),
    ],
)
def test_files_of_sentence_transformers_are_followed(
    files: dict[str, Any], expected: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    model = save(BertModel, bert_config(), tmp_path)
    write_sentence_files(tmp_path, **files)
    rows = np.stack([expected(hidden_states(model, text)).numpy() for text in TEXTS])
    np.testing.assert_allclose(embed(tmp_path), rows, atol=1e-5)


def test_a_dense_layer_is_applied(tmp_path: Path) -> None:
    model = save(BertModel, bert_config(), tmp_path)
    write_sentence_files(tmp_path, pooling={"pooling_mode": "mean"}, then=("Dense", "Normalize"))
    weights = load_file(tmp_path / "2_Dense" / "model.safetensors")

    def expected(text: str) -> Tensor:
        mean = hidden_states(model, text).mean(0)
        return unit(torch.tanh(weights["linear.weight"] @ mean + weights["linear.bias"]))

    np.testing.assert_allclose(embed(tmp_path), np.stack([expected(text).numpy() for text in TEXTS]), atol=1e-5)


def test_options_override_the_files(tmp_path: Path) -> None:
    model = save(BertModel, bert_config(), tmp_path)
    write_sentence_files(tmp_path, pooling={"pooling_mode": "max"}, then=("Normalize",))
    rows = np.stack([hidden_states(model, text)[0].numpy() for text in TEXTS])
    np.testing.assert_allclose(embed(tmp_path, pooling="cls", normalize=False), rows, atol=1e-5)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"pooling": {"pooling_mode": "max"}}, "pools by max"),
        ({"pooling": {"pooling_mode": ["mean", "cls"]}}, "pools by mean and cls"),
        ({"pooling": {}, "then": ("LSTM",)}, "LSTM"),
    ],
)
def test_what_is_not_served_is_refused(files: dict[str, Any], says: str, tmp_path: Path) -> None:
    save(BertModel, bert_config(), tmp_path)
    write_sentence_files(tmp_path, **files)
    with pytest.raises(UnsupportedModelError, match=says):
        LLM(str(tmp_path))


def test_a_dense_layer_without_weights_is_an_error(tmp_path: Path) -> None:
    save(BertModel, bert_config(), tmp_path)
    write_sentence_files(tmp_path, pooling={}, then=("Dense",))
    (tmp_path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2_Dense"):
        LLM(str(tmp_path))


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    save(BertModel, bert_config(num_hidden_layers=1), tmp_path)
    bert_config(num_hidden_layers=2, architectures=["BertModel"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="encoder.layer.1"):
        LLM(str(tmp_path))


class TestDimensions:
    @pytest.fixture
    def plain(self, tmp_path: Path) -> Path:
        save(BertModel, bert_config(), tmp_path)
        return tmp_path

    def test_cut_and_scaled_where_the_model_allows(self, plain: Path) -> None:
        options = {"matryoshka_dimensions": [8, 16]}
        write_sentence_files(plain, pooling={}, then=("Normalize",), options=options)
        with LLM(str(plain)) as llm:
            [whole], [part] = llm.embed("abc", use_tqdm=False), llm.embed("abc", dimensions=8, use_tqdm=False)
            head = np.array(whole.embedding[:8])
            np.testing.assert_allclose(part.embedding, head / np.linalg.norm(head), atol=1e-6)
            with pytest.raises(RequestError, match="must be one of 8, 16") as caught:
                llm.embed("abc", dimensions=9)
        assert caught.value.param == "dimensions"

    def test_refused_where_it_does_not(self, plain: Path) -> None:
        with LLM(str(plain)) as llm:
            assert len(llm.embed("abc", dimensions=32, use_tqdm=False)[0].embedding) == 32
            with pytest.raises(RequestError, match="not trained to be cut"):
                llm.embed("abc", dimensions=8)

    def test_a_size_in_the_files_is_the_default(self, plain: Path) -> None:
        write_sentence_files(plain, pooling={}, options={"truncate_dim": 12})
        with LLM(str(plain)) as llm:
            assert len(llm.embed("abc", use_tqdm=False)[0].embedding) == 12
            assert len(llm.embed("abc", dimensions=5, use_tqdm=False)[0].embedding) == 5
            with pytest.raises(RequestError, match="from 1 to 12"):
                llm.embed("abc", dimensions=13)


class TestLengths:
    def test_positions_behind_a_padding_row_are_usable(self, tmp_path: Path) -> None:
        save(RobertaModel, roberta_config(), tmp_path)
        with LLM(str(tmp_path)) as llm:
            assert llm.info.max_model_len == 62
            assert len(llm.embed("x" * 62, use_tqdm=False)[0].prompt_token_ids) == 62

    def test_the_files_limit_texts(self, tmp_path: Path) -> None:
        save(BertModel, bert_config(), tmp_path)
        write_sentence_files(tmp_path, pooling={})
        (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')
        with LLM(str(tmp_path)) as llm:
            assert llm.info.max_model_len == 10
        with LLM(str(tmp_path), max_model_len=64) as llm:
            assert llm.info.max_model_len == 64
        with pytest.raises(ConfigError, match="64 positions"):
            LLM(str(tmp_path), max_model_len=65)

    def test_longer_texts_are_refused_or_cut(self, tmp_path: Path) -> None:
        save(BertModel, bert_config(), tmp_path)
        with LLM(str(tmp_path)) as llm:
            with pytest.raises(PromptTooLongError, match="65 tokens .* at most 64") as caught:
                llm.embed(["a", "x" * 65])
            assert caught.value.param == "prompt[1]"
            [cut] = llm.embed("ab" * 40, truncate_prompt_tokens=-1, use_tqdm=False)
            [same] = llm.embed("ab" * 32, use_tqdm=False)
            np.testing.assert_allclose(cut.embedding, same.embedding, atol=1e-6)
            assert len(llm.embed([list(range(10))], truncate_prompt_tokens=4)[0].prompt_token_ids) == 4
            for wrong in (0, -2, 65):
                with pytest.raises(RequestError, match="truncate_prompt_tokens"):
                    llm.embed("a", truncate_prompt_tokens=wrong)


def test_every_form_of_prompt(tmp_path: Path) -> None:
    save(BertModel, bert_config(), tmp_path)
    with LLM(str(tmp_path)) as llm:
        token_ids = llm.tokenizer.encode("sea")
        forms: list[Any] = ["sea", token_ids, {"prompt": "sea"}, {"prompt_token_ids": token_ids}]
        outputs = llm.embed(forms, use_tqdm=False)
        assert [output.prompt for output in outputs] == ["sea", None, "sea", None]
        assert all(output.prompt_token_ids == token_ids for output in outputs)
        for output in outputs[1:]:
            np.testing.assert_allclose(output.embedding, outputs[0].embedding, atol=1e-6)
        assert llm.embed([]) == []


class TestScores:
    """Of an embedder: how alike two texts are."""

    def test_are_cosines_of_embeddings(self, tmp_path: Path) -> None:
        save(BertModel, bert_config(), tmp_path)
        with LLM(str(tmp_path), normalize=False) as llm:
            [first, *others] = [np.array(one.embedding) for one in llm.embed(TEXTS, use_tqdm=False)]
            scores = llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False)
            pairs = llm.score(TEXTS[:2], [TEXTS[1], llm.tokenizer.encode(TEXTS[2])], use_tqdm=False)
            num_tokens = [len(llm.tokenizer.encode(text)) for text in TEXTS]
        expected = [first @ other / np.linalg.norm(first) / np.linalg.norm(other) for other in others]
        np.testing.assert_allclose([one.score for one in scores], expected, atol=1e-5)
        assert [len(one.prompt_token_ids) for one in scores] == [num_tokens[0] + number for number in num_tokens[1:]]
        expected = [expected[0], float(unit(torch.tensor(others[0])) @ unit(torch.tensor(others[1])))]
        np.testing.assert_allclose([one.score for one in pairs], expected, atol=1e-5)

    def test_need_two_texts(self, tmp_path: Path) -> None:
        save(BertModel, bert_config(), tmp_path)
        with LLM(str(tmp_path)) as llm:
            for texts, says, param in (
                (("a",), "give the other text", "text_2"),
                ((["a", "b"], ["a", "b", "c"]), "2 and 3 texts", "text_2"),
                (("a" * 65, "b"), "65 tokens", "text_1"),
                (("a", ["b", "a" * 65]), "65 tokens", r"text_2[1]"),
            ):
                with pytest.raises(RequestError, match=says) as caught:
                    llm.score(*texts)
                assert caught.value.param == param
            assert llm.score("a", []) == []


def test_an_embedder_does_not_generate(tmp_path: Path, tiny_llama: Path) -> None:
    save(BertModel, bert_config(), tmp_path)
    with LLM(str(tmp_path)) as llm:
        for ask in (llm.generate, llm.classify):
            with pytest.raises(RequestError, match="embeds texts, .* LLM.embed"):
                ask("a")
        with pytest.raises(RequestError, match="LLM.embed"):
            llm.chat([{"role": "user", "content": "a"}])
    with LLM(str(tiny_llama), kv_cache_memory_bytes="1MiB") as llm, pytest.raises(RequestError, match="--task embed"):
        llm.embed("a")
