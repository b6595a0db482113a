"""What a module does is found out by running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pooling.models import bert_config, llama_config
from transformers import BertModel, LlamaModel, PreTrainedModel

from shardwright.errors import UnsupportedModelError
from shardwright.pooling.batching import Batching
from shardwright.pooling.check import choose_batching, read_ahead
from shardwright.pooling.embedding import EmbeddingHead
from shardwright.pooling.model import PoolingModel
from shardwright.pooling.sentence_config import PoolingMode


def batching_of(module: PreTrainedModel) -> Batching:
    head = EmbeddingHead(PoolingMode.MEAN, 32, [("Normalize", Path())], normalize=None)
    return choose_batching(PoolingModel(module.eval(), head), vocab_size=128)


class IgnoresTheMask(BertModel):
    """Padding is read like text."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        return super().forward(input_ids, **options)


class MixesTexts(BertModel):
    """Texts of a batch see each other."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        output = super().forward(*inputs, **options)
        output.last_hidden_state = output.last_hidden_state - 0.1 * output.last_hidden_state.mean(0, keepdim=True)
        return output


class Fails(BertModel):
    """As code does whose author ran it otherwise."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        raise KeyError("segments")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(BertModel, Batching.PADDED), (IgnoresTheMask, Batching.EQUAL), (MixesTexts, Batching.ALONE)],
)
def test_texts_share_a_pass_only_if_it_changes_nothing(kind: type[BertModel], expected: Batching) -> None:
    torch.manual_seed(0)
    assert batching_of(kind(bert_config())) is expected


def test_a_module_that_fails_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match="KeyError: 'segments'"):
        batching_of(Fails(bert_config()))
    with pytest.raises(UnsupportedModelError, match="KeyError: 'segments'"):
        read_ahead(Fails(bert_config()).eval(), vocab_size=128)


@pytest.mark.parametrize(
    ("module", "looks_ahead"), [(BertModel(bert_config()), True), (LlamaModel(llama_config()), False)]
)
def test_looking_ahead_is_seen(module: PreTrainedModel, looks_ahead: bool) -> None:
    assert read_ahead(module.eval(), vocab_size=128) == (32, looks_ahead)
