"""Many ranks give the tokens of one, for every kind of architecture, in every shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.custom.builder import MODELS
from tests.custom.builder import build as build_custom
from tests.parallel.served import SharedRanks, generate, make_config
from tests.zoo.architectures import FULL, MIXED, OVER_PAGES, SLIDING
from tests.zoo.builder import build

from shardwright import SamplingParams
from shardwright.engine.core import EngineCore
from shardwright.errors import PlanError
from shardwright.models.resolve import resolve_model
from shardwright.parallel.mp import MpRanks
from shardwright.parallel.ray import RayRanks

pytestmark = pytest.mark.slow

SHAPES = {
    "tp2": (2, 1, MpRanks),
    "tp3": (3, 1, MpRanks),
    "pp2": (1, 2, MpRanks),
    "pp3": (1, 3, MpRanks),
    "tp2-pp2": (2, 2, MpRanks),
    "ray-tp2": (2, 1, RayRanks),
    "ray-tp3": (3, 1, RayRanks),
    "ray-pp2": (1, 2, RayRanks),
    "ray-pp3": (1, 3, RayRanks),
    "ray-tp2-pp2": (2, 2, RayRanks),
}
"""Tensor-parallel ranks, pipeline stages, and where they run."""

TRANSFORMERS = (
    "cohere2", "deepseek_v3", "gemma2", "glm_moe_dsa", "gpt2", "gpt_neox", "gpt_oss", "llama", "mistral", "mixtral",
    "olmo2", "opt", "phi3", "qwen3_moe", "stablelm",
)  # fmt: skip
"""Experts, tied embeddings, windows, latent attention, sinks, an index of its own; projections that are fused,
interleaved, or [in, out]."""

CUSTOM = ("local_global", "moe_loop", "tril_gpt")
"""Layers in a ModuleDict; no plan, no interface."""

LAYERS = 4
"""Of Transformers' architectures, so that every stage has some."""

NO_STAGES = "local_global"
"""Its code runs the parts of its layers, and never a layer."""

SAMPLE = {
    "tp2": ("phi3",),
    "tp3": ("qwen3_moe",),
    "pp2": ("local_global",),
    "pp3": ("gemma2",),
    "tp2-pp2": ("gpt_oss", "tril_gpt"),
    "ray-tp2": ("mixtral",),
    "ray-pp2": ("deepseek_v3",),
}
"""What every run of the tests has of them; `make sweep` runs the rest."""

CASES = [
    pytest.param(shape, name, marks=[] if name in SAMPLE.get(shape, ()) else pytest.mark.sweep)
    for shape in SHAPES
    for name in TRANSFORMERS + CUSTOM
]

Answers = tuple[Path, list[list[int]], list[list[int]]]
"""Directory, prompts, and what Hugging Face or the model's own code gives."""


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Answers]:
    """Models by name, each made once."""
    made: dict[str, Answers] = {}

    def find(name: str) -> Answers:
        if name not in made:
            directory = tmp_path_factory.mktemp("parallel") / name
            if name in CUSTOM:
                custom = build_custom(MODELS / name, directory)
                made[name] = custom.path, custom.prompts, custom.outputs
            else:
                fields = (FULL | SLIDING | MIXED | OVER_PAGES)[name]
                reference = build(name, {"num_hidden_layers": LAYERS} | fields, directory)
                made[name] = reference.path, reference.prompts, reference.outputs
        return made[name]

    return find


@pytest.fixture(scope="module")
def shape(request: pytest.FixtureRequest) -> Iterator[tuple[int, int, SharedRanks]]:
    tp, pp, ranks = SHAPES[request.param]
    shared = SharedRanks(ranks)
    yield tp, pp, shared
    shared.close()


@pytest.mark.parametrize(("shape", "name"), CASES, indirect=["shape"])
def test_tokens_are_those_of_one_rank(
    shape: tuple[int, int, SharedRanks], name: str, answers: Callable[[str], Answers]
) -> None:
    tp, pp, shared = shape
    path, prompts, outputs = answers(name)
    if pp > 1 and name == NO_STAGES:
        with pytest.raises(PlanError, match="layer_0 never runs: a pipeline needs layers that run once each"):
            shared.serve(make_config(path, tp, pp, max_model_len=64))
        return
    core = shared.serve(make_config(path, tp, pp, max_model_len=64))
    params = SamplingParams(temperature=0, max_tokens=len(outputs[0]), ignore_eos=True)
    assert generate(core, prompts, params) == outputs
    assert len(core.info.rank_weight_bytes) == tp * pp
    assert generate(core, prompts, params) == outputs  # of prompts whose beginnings are cached


@pytest.mark.parametrize(
    "shape",
    [name if name == "tp3" else pytest.param(name, marks=pytest.mark.sweep) for name in SHAPES],
    indirect=True,
)
def test_the_starter_model_on_many_ranks(shape: tuple[int, int, SharedRanks]) -> None:
    """9 query heads and 3 key heads; one more rank than divides them, and a pipeline whose head is tied."""
    tp, pp, shared = shape
    path = resolve_model("smollm2-135m")
    prompts = [[1, 4093, 253, 655], [28, 1043, 7, 42, 260, 1000, 99], list(range(300, 340))]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    alone = EngineCore.from_config(make_config(path, max_model_len=128))
    expected = generate(alone, prompts, params)
    alone.close()
    assert generate(shared.serve(make_config(path, tp, pp, max_model_len=128)), prompts, params) == expected
