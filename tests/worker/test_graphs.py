"""Decode steps that are repeated on the same memory give the tokens that the model's code gives.

Nothing is captured on a CPU: instead, what would be is done again, on the same tensors, into the same output.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.kernels.triton import plain
from tests.zoo.architectures import LATENT
from tests.zoo.builder import NUM_TOKENS, build
from tests.zoo.served import Architecture
from tests.zoo.test_tokens import ARCHITECTURES
from torch import Tensor

from shardwright import LLM, SamplingParams
from shardwright.adapt.paged import ForwardInputs
from shardwright.attention import triton
from shardwright.attention.batched import BatchedBackend
from shardwright.attention.triton import TritonBackend, TritonPlan
from shardwright.cache.spec import CacheGroup, Visibility
from shardwright.worker import packed
from shardwright.worker.graphs import DecodeGraphs, Shape, sizes_up_to
from shardwright.worker.step import StepTables

CPU = torch.device("cpu")
VOCAB_SIZE = 64


class Rerun:
    """A capture that counts how often each piece of work is repeated."""

    def __init__(self) -> None:
        self.num_replays: list[int] = []

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        place, output = len(self.num_replays), work()
        self.num_replays.append(0)

        def replay() -> Tensor:
            self.num_replays[place] += 1
            return output.copy_(work())

        return replay


class FakeModel:
    """Logits that say which token, position, slots and blocks a row was computed with, and what was given last."""

    def __init__(self) -> None:
        self.inputs: ForwardInputs | None = None
        self.forward: Callable[[ForwardInputs], Tensor] = self.plain

    def plain(self, inputs: ForwardInputs) -> Tensor:
        self.inputs = inputs
        logits = torch.zeros(len(inputs.input_ids), VOCAB_SIZE)
        logits[:, 0], logits[:, 1] = inputs.input_ids, inputs.position_ids
        for group, (slots, plan) in enumerate(zip(inputs.slot_mappings, inputs.plans, strict=True)):
            assert isinstance(plan, TritonPlan)
            assert plan.decodes is not None
            tiles = plan.decodes.tiles(4)
            logits[:, 2 + 3 * group], logits[:, 3 + 3 * group] = slots, tiles.computed
            logits[:, 4 + 3 * group] = tiles.tables[:, 0]
        return logits


def make_graphs(model: FakeModel, capture: Rerun, *, max_num_seqs: int = 5, num_blocks: int = 40) -> DecodeGraphs:
    batched = BatchedBackend(block_size=4, device=CPU, compute_dtype=torch.float32)
    groups = [CacheGroup(Visibility(), (0,)), CacheGroup(Visibility(), (1,))]
    shape = Shape(groups, 4, max_num_seqs, 32, num_blocks, VOCAB_SIZE, torch.float32)
    return DecodeGraphs(
        lambda inputs: model.forward(inputs), TritonBackend(batched, CPU), shape, device=CPU, capture=capture
    )


def decodes(rows: list[int]) -> StepTables:
    """Row r decodes token r + 10 at position r + 5."""
    token_rows = np.zeros((8, 32), np.int32)
    for row in range(8):
        token_rows[row, row + 5] = row + 10
    tables = np.arange(1, 65, dtype=np.int32).reshape(8, 8)
    return StepTables(
        token_rows=token_rows,
        block_tables=[tables, tables + 64],
        rows=np.array(rows),
        num_computed=np.array(rows) + 5,
        num_tokens=np.ones(len(rows), np.int64),
        logits_rows=np.arange(len(rows)),
    )


def test_sizes_are_powers_of_two_and_the_most() -> None:
    assert [sizes_up_to(most) for most in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]


@pytest.mark.parametrize("rows", [[0], [6, 2], [3, 1, 7], [0, 1, 2, 3, 4]])
def test_a_step_is_filled_up_to_the_next_size(rows: list[int]) -> None:
    model, capture = FakeModel(), Rerun()
    graphs = make_graphs(model, capture)
    assert graphs.capture_all() is None
    step = decodes(rows)
    assert graphs.takes(step)
    logits = graphs.run(step)
    assert logits.shape == (len(rows), VOCAB_SIZE)
    slots = [8 * 4 * row + 4 + row + 5 for row in rows]
    expected = [
        [row + 10, row + 5, slot, row + 5, 8 * row + 1, slot + 256, row + 5, 8 * row + 65]
        for row, slot in zip(rows, slots, strict=True)
    ]
    assert logits[:, :8].tolist() == expected
    assert model.inputs is not None
    padded = len(model.inputs.input_ids)
    assert padded == {1: 1, 2: 2, 3: 4, 5: 5}[len(rows)]
    for slots_T in model.inputs.slot_mappings:  # what fills up the step writes to the null block
        assert (slots_T[len(rows) :] < 4).all()


def test_other_steps_are_left_to_the_code() -> None:
    graphs = make_graphs(FakeModel(), Rerun())
    assert not graphs.takes(decodes([1]))  # nothing is captured yet
    graphs.capture_all()
    one = decodes([1])
    assert graphs.takes(one)
    assert not graphs.takes(decodes([0, 1, 2, 3, 4, 5]))
    for change in ("num_tokens", "num_computed", "logits_rows"):
        changed = decodes([1])
        object.__setattr__(
            changed,
            change,
            {"num_tokens": np.array([2]), "num_computed": np.array([0]), "logits_rows": np.zeros(0, np.int64)}[change],
        )
        assert not graphs.takes(changed)


def test_what_depends_on_more_than_tensors_is_not_repeated() -> None:
    """Code that looked at a position when it was captured."""
    model, seen = FakeModel(), []

    def forward(inputs: ForwardInputs) -> Tensor:
        seen.append(int(inputs.position_ids[0]))
        return model.plain(inputs) + 100 * seen[len(seen) // 3 * 3 - 3 if len(seen) % 3 == 0 else -1]

    model.forward = forward
    problem = make_graphs(model, Rerun()).capture_all()
    assert problem is not None
    assert "decodes of 5 sequences are not captured: UnsupportedModelError: logits differ" in problem


def test_code_that_cannot_be_captured_runs_as_it_is() -> None:
    def refuse(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = make_graphs(FakeModel(), Rerun())
    graphs._capture = refuse
    assert graphs.capture_all() == (
        "decodes of 5 sequences are not captured: RuntimeError: operation not permitted when stream is capturing"
    )
    assert not graphs.takes(decodes([1]))


def test_a_small_cache_has_room_for_small_sizes() -> None:
    graphs = make_graphs(FakeModel(), Rerun(), num_blocks=6)  # two groups of layers take a block of each sequence
    assert graphs.capture_all() is None
    assert graphs.takes(decodes([0, 1]))
    assert not graphs.takes(decodes([0, 1, 2]))


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> Rerun:
    """With plain kernels, as those of GPUs take the interpreter long, and are tested beside their launchers."""
    capture = Rerun()
    monkeypatch.setattr(packed, "capture_on", lambda device: capture)
    monkeypatch.setattr(triton, "paged_attention", plain.paged_attention)
    monkeypatch.setattr(triton, "store_rows", plain.store_rows)
    return capture


def test_tokens_are_those_of_the_code(tiny_llama: Path, rerun: Rerun) -> None:
    """Three requests of different lengths: steps of 3, 2 and 1 sequences, the first filled up to 4."""
    prompts, most = [[5, 9, 17], [*range(20, 39)], [7] * 6], (3, 5, 6)
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in most]
    options = {"block_size": 4, "max_model_len": 32, "max_num_seqs": 4}
    tokens = []
    for more in ({"attention_backend": "triton"}, {"enforce_eager": True}):
        with LLM(str(tiny_llama), **options, **more) as llm:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        tokens.append([output.outputs[0].token_ids for output in outputs])
    assert tokens[0] == tokens[1]
    assert rerun.num_replays == [1 + 2, 1 + 2, 1 + 1]  # of 4, 2 and 1 sequences, once each to try them


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["bloom", "deepseek_v3", "gemma2", "gpt_oss", "llama4_text"])
def test_tokens_equal_the_reference(name: str, tmp_path: Path, rerun: Rerun) -> None:
    rung = "dataflow" if name == "bloom" else "interface"
    reference = build(name, ARCHITECTURES[name], tmp_path)
    architecture = Architecture(reference, rung, caches_latents=name in LATENT)
    with architecture.engine(attention_backend="triton") as llm:
        architecture.check_all(llm)
    assert sum(rerun.num_replays) >= NUM_TOKENS - 1
