"""Pipeline stages climb the ladder together: each on its own layers, all to the same rung."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.plans.staged import make_stages, table_of
from tests.zoo.builder import draw, make_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from shardwright.config import ParallelConfig
from shardwright.plans.pipeline import PipelineStage
from shardwright.worker.cut import give_empty_logits
from shardwright.worker.ladder import climb
from shardwright.worker.step import StepModel

WIDTH, VOCABULARY, POSITIONS = 32, 128, 64
TWO_STAGES = ParallelConfig(pipeline_parallel_size=2, distributed_executor_backend="mp")


class Block(nn.Module):
    def __init__(self, *, attends: bool = True) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH) if attends else None

    def forward(self, x: Tensor) -> Tensor:
        if self.qkv is None:
            return x + self.out(F.gelu(self.norm(x)))
        q, k, v = (y.view(1, -1, 2, WIDTH // 2).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, dim=-1))
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Raw(Block):
    """Attention written out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


class Model(nn.Module):
    def __init__(self, layers: list[nn.Module], *, last_alone: bool = False) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.last_alone = last_alone

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, -1:] if self.last_alone else x)  # type: ignore[no-any-return]


class MixedHeads(Block):
    """Weights that heads mix among each other: no attention that we compute."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.mix = index, nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor, bias: Tensor, past: Cache | None) -> Tensor:  # type: ignore[override]
        assert self.qkv is not None
        q, k, v = (y.view(1, -1, 2, WIDTH // 2).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, dim=-1))
        if past is not None:
            k, v = past.update(k, v, self.index)
        weights = torch.einsum("bhqk,hg->bgqk", (q @ k.mT / 4 + bias).softmax(-1), self.mix)
        return (x + self.out((weights @ v).transpose(1, 2).flatten(2))).tanh()


class CachedModel(PreTrainedModel, GenerationMixin):
    """Asks the first layer's part of its cache for positions, and a later one's for its mask."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(MixedHeads(index) for index in range(config.num_hidden_layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_tokens = input_ids.shape[1]
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        num_keys = past_key_values.get_mask_sizes(num_tokens, 2)[0] if past_key_values is not None else num_tokens
        keys, queries = torch.arange(num_keys), torch.arange(start, start + num_tokens)
        bias = (0.1 * keys).masked_fill(keys > queries[:, None], float("-inf"))
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, bias, past_key_values)
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=past_key_values)


def cached_model() -> nn.Module:
    return CachedModel(PretrainedConfig(num_hidden_layers=3))


def config_model(model_type: str, **fields: object) -> Callable[[], nn.Module]:
    return lambda: draw(make_config(model_type, fields), seed=0)


COUNTS_IN_ONE_STAGE: dict[str, object] = {
    "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 8, "intermediate_size_mlp": 96,
    "num_local_experts": 2,
}  # fmt: skip
"""Of Llama 4, whose layers without rotary positions count tokens to scale their queries."""


class Disagreed(BaseException):  # past whoever catches what the model's code raises
    """The last stage says no where the first was told that all say yes."""


def climb_in_turn(module: nn.Module) -> list[StepModel]:
    """Both stages climb, the first before the second: what it hands over waits.

    The first does not know yet what the second will say no to; so they begin anew, with what is known by now. The last
    one compares with its own plain forward pass, in steps of several requests, before it stands anywhere.
    """
    denied: set[int] = set()
    while True:
        models, answers = [], list[bool]()
        try:
            for part, stage in make_stages(module, table_of(module, 2)):
                if not models:
                    give_empty_logits(part)
                models.append(_climb(part, stage, denied, answers, is_last=bool(models)))
        except Disagreed:
            continue
        return models


def _climb(part: nn.Module, stage: PipelineStage, denied: set[int], answers: list[bool], *, is_last: bool) -> StepModel:
    number = -1

    def agree(value: bool) -> bool:
        nonlocal number
        number += 1
        stage.settle()
        if not is_last:
            answers.append(value and number not in denied)
        elif answers[number] and not value:
            denied.add(number)
            raise Disagreed
        return answers[number]

    return climb(
        part,
        num_positions=POSITIONS,
        vocab_size=VOCABULARY,
        block_size=4,
        dtype=torch.float32,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        parallel=TWO_STAGES,
        agree=agree,
    )


@pytest.mark.parametrize(
    ("make", "rung", "num_layers"),
    [
        (config_model("llama"), "interface", [1, 1]),
        (config_model("gpt2"), "interface", [1, 1]),
        (config_model("mistral", num_hidden_layers=3), "interface", [2, 1]),
        (config_model("llama4_text", **COUNTS_IN_ONE_STAGE), "interface", [2, 2]),
        (config_model("mamba"), "state", [0, 0]),
        (config_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"]), "state", [0, 1]),
        (config_model("recurrent_gemma", num_hidden_layers=3, attention_window_size=16, lru_width=64), "state", [0, 1]),
        (lambda: Model([Block() for _ in range(3)]), "sdpa", [2, 1]),
        (lambda: Model([Raw() for _ in range(2)]), "dataflow", [1, 1]),
        (lambda: Model([Block() for _ in range(2)], last_alone=True), "sdpa", [1, 1]),
        (cached_model, "per-request", [0, 0]),
    ],
    ids=[
        "llama",
        "gpt2",
        "sliding",
        "counts",
        "states",
        "states apart",
        "states on modules",
        "sdpa",
        "raw",
        "last token alone",
        "cache of its own",
    ],
)
def test_stages_stand_on_the_rung_of_the_whole_model(
    make: Callable[[], nn.Module], rung: str, num_layers: list[int]
) -> None:
    torch.manual_seed(0)
    models = climb_in_turn(make().eval())
    assert [model.rung for model in models] == [rung, rung]
    counts = [len(model.layers) for model in models]
    assert sorted(counts) == sorted(num_layers)


def test_a_stage_without_attention_goes_along() -> None:
    torch.manual_seed(0)
    models = climb_in_turn(Model([Block(attends=False), Block()]).eval())
    assert [len(model.layers) for model in models] == [0, 1]
    assert models[1].rung == "sdpa"
    assert models[0].bytes_per_block(4) > 0


def test_a_rung_that_is_wrong_for_another_rank_is_not_taken() -> None:
    # Its own pass, far positions, attention, no latents, counts, none of them, the rung, its logits.
    answers = iter([True] * 7 + [False])
    model = climb(
        draw(make_config("llama", {}), seed=0),
        num_positions=POSITIONS,
        vocab_size=VOCABULARY,
        block_size=4,
        dtype=torch.float32,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        agree=lambda value: value and next(answers, True),
    )
    assert model.rung == "dataflow"
    assert next(answers, None) is None
