"""A model is served on the highest rung that gives its own logits, whatever its code assumes in silence."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tests.adapt.models import make_model
from tests.models.custom_models import make_tale
from tests.models.modeling_tale import Tale
from tests.zoo.builder import draw, make_config
from torch import Tensor, nn
from transformers import GenerationMixin

from shardwright import LLM, SamplingParams
from shardwright.adapt.rungs import AttentionRung
from shardwright.adapt.served_model import ServedModel
from shardwright.attention.batched import BatchedBackend
from shardwright.errors import UnsupportedModelError
from shardwright.worker.ladder import climb
from shardwright.worker.packed import PackedModel
from shardwright.worker.self_check import TOLERANCE, check_logits, plain_logits
from shardwright.worker.step import StepModel

CPU = torch.device("cpu")


def climbed(
    module: nn.Module, dtype: torch.dtype = torch.float32, block_size: int = 4, self_check: bool = True
) -> StepModel:
    return climb(
        module,
        num_positions=256,
        vocab_size=128,
        block_size=block_size,
        dtype=dtype,
        compute_dtype=dtype,
        device=CPU,
        self_check=self_check,
    )


class CountsByArange(Tale):
    """Gets position_ids and counts all the same; that is found out and mended."""

    def places(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return torch.arange(input_ids.shape[1])[None]


class CountsForOtherReasons(CountsByArange):
    """The second count finds the tokens of the prompt, wherever they stand."""

    def tell(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return super().tell(input_ids, position_ids)[:, torch.arange(input_ids.shape[1])]


class RemembersItsCounts(Tale):
    def places(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        known: dict[int, Tensor] = self.__dict__.setdefault("known", {})
        length = input_ids.shape[1]
        if length not in known:
            known[length] = torch.arange(length)[None]
        return known[length]


class CountsByCumsum(Tale):
    """Like Transformers' OPT."""

    def places(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return torch.ones_like(input_ids).cumsum(1) - 1


class LooksAtTheWordBefore(Tale):
    def tell(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = super().tell(input_ids, position_ids)
        return x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


class SumsUpTheWords(Tale):
    def tell(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return super().tell(input_ids, position_ids).cumsum(1)


class KnowsTheEnd(Tale):
    """No function of the past: every word changes those before it."""

    def tell(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = super().tell(input_ids, position_ids)
        return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize("kind", [Tale, CountsByArange, CountsByCumsum, CountsForOtherReasons])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_honest_code_is_packed(kind: type[Tale], block_size: int) -> None:
    assert climbed(make_tale(kind), block_size=block_size).rung is AttentionRung.INTERFACE


def test_code_that_remembers_its_counts_is_made_to_forget() -> None:
    model = climbed(make_tale(RemembersItsCounts))
    assert model.rung is AttentionRung.DATAFLOW
    assert isinstance(model, PackedModel)
    assert len(model.served.module.known) == 1  # of the last pass, which the next one begins without


@pytest.mark.parametrize("kind", [LooksAtTheWordBefore, SumsUpTheWords, KnowsTheEnd])
def test_code_that_cheats_is_not_packed(kind: type[Tale], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = climbed(make_tale(kind))
    assert model.rung is AttentionRung.RECOMPUTE
    assert "not interface: logits differ from those of its own forward pass" in model.rung_reason
    assert "one request at a time" in caplog.text


@pytest.mark.parametrize("kind", [Tale, SumsUpTheWords])
def test_without_the_check_the_first_rung_that_can_be_built_is_taken(
    kind: type[Tale], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = climbed(make_tale(kind), self_check=False)
    assert model.rung is AttentionRung.INTERFACE
    assert [record.getMessage() for record in caplog.records] == [
        "rung 'interface' was not checked: that the model's tokens are right was not verified"
    ]


class InsistsOnItsOwn(Tale):
    """Cannot be built on the first rung, whether or not it would be right there."""

    def tell(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        if self.config._attn_implementation != "eager":
            raise RuntimeError("no attention but my own")
        return super().tell(input_ids, position_ids)


def test_without_the_check_a_rung_must_still_be_built() -> None:
    model = climbed(make_tale(InsistsOnItsOwn), self_check=False)
    assert model.rung is AttentionRung.DATAFLOW


def test_the_check_is_skipped_on_request(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [9]}]
    tokens = []
    for self_check in (True, False):
        with LLM(str(tiny_llama), kv_cache_memory_bytes="1MiB", self_check=self_check) as llm:
            assert ("not verified" in caplog.text) is not self_check
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
            tokens.append([output.outputs[0].token_ids for output in outputs])
    assert tokens[0] == tokens[1]


class Speechless(Tale):
    def tell(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        raise RuntimeError("no words")


def test_code_that_does_not_run_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="its forward pass fails: RuntimeError: no words"):
        climbed(make_tale(Speechless))


@pytest.mark.parametrize("model_type", ["gptj", "codegen"])
def test_code_that_adds_a_mask_of_transformers_is_packed(model_type: str) -> None:
    """The mask would tell packed sequences apart by itself, on another path than for one."""
    module = make_model(model_type, n_embd=64, n_head=4, n_layer=2, rotary_dim=8)
    assert climbed(module).rung is AttentionRung.DATAFLOW


OVER_PAGES = "2 layers run their own attention over pages"


def test_attention_that_is_more_than_attention_runs_over_pages() -> None:
    """Doge adds to its scores what it computes from values; as its constructor leaves it, that is nothing."""
    model = climbed(draw(make_config("doge", {}), seed=0))
    assert isinstance(model, PackedModel)
    assert model.rung is AttentionRung.INTERFACE
    assert model.rung_reason == f"{OVER_PAGES}, decodes as a batch, prompts one by one"
    assert model.takes_chunks
    assert model.reuses_prefixes
    assert model.record(num_positions=256, vocab_size=128, most_tokens=64, most_rows=64) is not None


def test_code_that_looks_at_what_is_masked_gets_a_request_at_a_time() -> None:
    """It does so only in long contexts, which the check of logits does not reach."""
    module = draw(make_config("doge", {"sliding_window": None}), seed=0)

    def less_the_first(_: nn.Module, args: tuple[Tensor], weights: Tensor) -> Tensor:
        return weights - 2 * weights[:, :1] if weights.shape[1] > 32 else weights

    for layer in module.model.layers:
        layer.self_attn.dt_proj.register_forward_hook(less_the_first)
    assert climbed(module).rung_reason == f"{OVER_PAGES}, a request at a time"


def test_models_that_cannot_be_packed_keep_their_own_cache() -> None:
    """Doge, when it is not told positions, counts them by the length of its cache."""
    module = draw(make_config("doge", {}), seed=0)
    forward = module.forward

    def without_positions(self, input_ids, past_key_values=None, use_cache=None, return_dict=None):  # type: ignore[no-untyped-def]
        return forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    module.forward = without_positions.__get__(module)
    assert isinstance(module, GenerationMixin)
    model = climbed(module)
    assert model.rung is AttentionRung.PER_REQUEST
    assert model.rung_reason.startswith("not interface: ")
    assert not model.takes_chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_honest_difference_is_far_below_the_tolerance(dtype: torch.dtype) -> None:
    module = make_model("llama", initializer_range=0.2).to(dtype)
    expected = plain_logits(module, vocab_size=128)
    served = ServedModel(module, num_positions=256)
    backend = BatchedBackend(block_size=4, device=CPU, compute_dtype=torch.float32)
    model = PackedModel(served, backend, dtype=dtype, device=CPU)
    difference = check_logits(model, expected, vocab_size=128, block_size=4, dtype=dtype)
    assert difference < TOLERANCE[dtype] / 4


def test_logits_that_are_not_numbers_do_not_pass() -> None:
    module = make_tale()
    module.next_word.weight.data[3] = float("nan")
    model = climbed(module)
    assert model.rung is AttentionRung.RECOMPUTE
    assert "by nan of their spread" in model.rung_reason
