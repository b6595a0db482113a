"""Classifications and scores equal to a plain forward pass of Transformers, alone and batched."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import build_tokenizer
from tests.pooling.models import bert_config, llama_config, save
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from shardwright import LLM
from shardwright.errors import CheckpointError, RequestError

TEXTS = ["a", "Once upon a time", "x" * 40, "the sea, the sea", "?!"]
LABELS = {0: "bad", 1: "fair", 2: "good"}


def logits(model: PreTrainedModel, text: str) -> list[float]:
    with torch.inference_mode():
        return model(torch.tensor([build_tokenizer()(text)["input_ids"]])).logits[0].tolist()


def test_labels_and_their_probabilities(tmp_path: Path) -> None:
    model = save(BertForSequenceClassification, bert_config(id2label=LABELS), tmp_path)
    with LLM(str(tmp_path)) as llm:
        assert (llm.info.task, llm.info.pooling.labels) == ("classify", ["bad", "fair", "good"])
        outputs = llm.classify(TEXTS, use_tqdm=False)
    for text, output in zip(TEXTS, outputs, strict=True):
        expected = logits(model, text)
        np.testing.assert_allclose(output.logits, expected, atol=1e-5)
        np.testing.assert_allclose(output.probs, torch.tensor(expected).softmax(0), atol=1e-5)
        assert output.label == LABELS[int(np.argmax(expected))]
        assert output.prompt == text


def test_labels_that_do_not_exclude_each_other(tmp_path: Path) -> None:
    config = bert_config(id2label=LABELS, problem_type="multi_label_classification")
    save(BertForSequenceClassification, config, tmp_path)
    with LLM(str(tmp_path)) as llm:
        [output] = llm.classify("abc", use_tqdm=False)
    np.testing.assert_allclose(output.probs, torch.tensor(output.logits).sigmoid(), atol=1e-6)


@pytest.mark.parametrize("pad_token_id", [0, None])
def test_a_reward_model_on_a_decoder(pad_token_id: int | None, tmp_path: Path) -> None:
    config = llama_config(num_labels=1, pad_token_id=pad_token_id)
    model = save(LlamaForSequenceClassification, config, tmp_path)
    with LLM(str(tmp_path)) as llm:
        scores = [output.score for output in llm.score(TEXTS, use_tqdm=False)]
        padded = "padded" in llm.info.attention_reason
        with pytest.raises(RequestError, match="classifies texts"):
            llm.embed("a")
    np.testing.assert_allclose(scores, [logits(model, text)[0] for text in TEXTS], atol=1e-5)
    assert padded == (pad_token_id is not None)  # its code takes batches only if it knows padding


def test_a_score_needs_a_single_label(tmp_path: Path) -> None:
    save(BertForSequenceClassification, bert_config(id2label=LABELS), tmp_path)
    with LLM(str(tmp_path)) as llm, pytest.raises(RequestError, match="3 labels"):
        llm.score("a", "b")


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Marks the second text by its token types, as BERT's does."""
    backend = build_tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", model_input_names=names)


class TestPairs:
    QUERY = "who?"
    ANSWERS = ("me", "nobody at all", "x")

    @pytest.fixture
    def model(self, tmp_path: Path) -> BertForSequenceClassification:
        model = save(BertForSequenceClassification, bert_config(num_labels=1), tmp_path)
        pair_tokenizer().save_pretrained(tmp_path)
        assert isinstance(model, BertForSequenceClassification)
        return model

    def expected(self, model: BertForSequenceClassification) -> list[float]:
        tokenizer = pair_tokenizer()
        encoded = [tokenizer(self.QUERY, answer, return_tensors="pt") for answer in self.ANSWERS]
        assert all(one["token_type_ids"].any() for one in encoded)
        with torch.inference_mode():
            return [float(model(**one).logits) for one in encoded]

    def scores(self, path: Path, *texts: Any) -> list[float]:
        with LLM(str(path)) as llm:
            return [output.score for output in llm.score(*texts, use_tqdm=False)]

    def test_are_scored_between_0_and_1(self, model: BertForSequenceClassification, tmp_path: Path) -> None:
        expected = [1 / (1 + math.exp(-logit)) for logit in self.expected(model)]
        np.testing.assert_allclose(self.scores(tmp_path, self.QUERY, self.ANSWERS), expected, atol=1e-5)
        firsts = [self.QUERY] * 3
        np.testing.assert_allclose(self.scores(tmp_path, firsts, self.ANSWERS), expected, atol=1e-5)

    def test_are_scored_by_their_logit_if_the_config_says_so(
        self, model: BertForSequenceClassification, tmp_path: Path
    ) -> None:
        config = json.loads((tmp_path / "config.json").read_text())
        config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        np.testing.assert_allclose(self.scores(tmp_path, self.QUERY, self.ANSWERS), self.expected(model), atol=1e-5)

    @pytest.mark.usefixtures("model")
    def test_need_as_many_of_both(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="2 and 3 texts"):
            self.scores(tmp_path, ["a", "b"], self.ANSWERS)

    @pytest.mark.usefixtures("model")
    def test_must_be_texts(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="both texts of a pair must be strings"):
            self.scores(tmp_path, [5, 6], ["a"])


def test_a_classifier_without_its_head_is_an_error(tmp_path: Path) -> None:
    from transformers import BertModel

    save(BertModel, bert_config(), tmp_path)
    with pytest.raises(CheckpointError, match="classifier"):
        LLM(str(tmp_path), task="classify")
