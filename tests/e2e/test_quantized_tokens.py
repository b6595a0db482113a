"""Quantized weights: many ranks give the tokens of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.parallel.served import SharedRanks, generate, make_config
from tests.zoo.architectures import FULL, MIXED, SLIDING
from tests.zoo.builder import build

from shardwright import SamplingParams
from shardwright.engine.core import EngineCore
from shardwright.models.resolve import resolve_model
from shardwright.parallel.mp import MpRanks

pytestmark = pytest.mark.slow

ARCHITECTURES = ("llama", "gpt2", "phi3", "qwen2_moe", "gpt_neox")
SHAPES = {"tp2": (2, 1), "tp3": (3, 1), "tp2-pp2": (2, 2)}
SAMPLE = {("tp3", "llama", "int4"), ("tp2-pp2", "gpt2", "int8")}
CASES = [
    pytest.param(shape, name, kind, marks=[] if (shape, name, kind) in SAMPLE else pytest.mark.sweep)
    for shape in SHAPES
    for name in ARCHITECTURES
    for kind in ("int8", "int4")
]


@pytest.fixture(scope="module")
def shape(request: pytest.FixtureRequest) -> Iterator[tuple[int, int, SharedRanks]]:
    shared = SharedRanks(MpRanks)
    yield *SHAPES[request.param], shared
    shared.close()


@pytest.mark.parametrize(("shape", "name", "kind"), CASES, indirect=["shape"])
def test_tokens_are_those_of_one_rank(
    shape: tuple[int, int, SharedRanks], name: str, kind: str, tmp_path: Path
) -> None:
    tp, pp, shared = shape
    path = build(name, (FULL | SLIDING | MIXED)[name], tmp_path).path
    options = {"max_model_len": 64, "quantization": kind, "quantization_group_size": 8}
    alone = EngineCore.from_config(make_config(path, **options))
    expected = generate(alone)
    core = shared.serve(make_config(path, tp, pp, **options))
    assert generate(core) == expected
    assert max(core.info.rank_weight_bytes) < alone.info.weight_bytes
    alone.close()


@pytest.mark.parametrize(
    ("tp", "kind"),
    [(3, "int4"), *(pytest.param(*case, marks=pytest.mark.sweep) for case in ((2, "int4"), (3, "int8")))],
)
def test_the_starter_model_on_many_ranks(tp: int, kind: str) -> None:
    path = resolve_model("smollm2-135m")
    prompts = [[1, 4093, 253, 655], [28, 1043, 7, 42, 260, 1000, 99], list(range(300, 340))]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    found, held = [], []
    for ranks in (1, tp):
        core = EngineCore.from_config(make_config(path, ranks, max_model_len=128, quantization=kind))
        found.append(generate(core, prompts, params))
        held.append(core.info.rank_weight_bytes)
        core.close()
    assert found[0] == found[1]
    assert max(held[1]) < 0.5 * held[0][0]
