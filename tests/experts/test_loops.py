"""Loops over experts run all at once where that is the same, whatever they look like; other code runs as written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.experts import blocks
from tests.experts.blocks import WIDTH
from torch import Tensor, nn

from shardwright.experts.block import GroupedExperts
from shardwright.experts.loops import ExpertLoops

SHAPES = ((1, 9), (3, 1), (1, 1), (2, 7), (1, 300))


class Around(nn.Module):
    """A model that is not much more than its block."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.block = kind()

    def forward(self, x: Tensor) -> Tensor:
        output = self.block(x)
        return output[0] if isinstance(output, tuple) else output


def make(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> Around:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Around(kind).eval().requires_grad_(False).to(dtype)


def watched(model: nn.Module, *, unless: str | None = None, agree: Callable[[bool], bool] = bool) -> ExpertLoops:
    loops = ExpertLoops(model, unless=unless)
    parameter = next(model.parameters())
    with torch.inference_mode(), loops.watching():
        model(torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(2)).to(parameter))
    loops.group(agree)
    return loops


def leaves(output: object) -> list[Tensor]:
    return [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]


@torch.inference_mode()
def compare(block: nn.Module, kind: type[nn.Module], *, tolerance: float = 1e-5) -> None:
    """A block against its own code, in inputs of several shapes."""
    dtype = next(block.parameters()).dtype
    for shape in SHAPES:
        x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
        for actual, expected in zip(leaves(block(x)), leaves(kind.forward(block, x)), strict=True):
            assert actual.shape == expected.shape
            assert actual.dtype is expected.dtype
            torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", blocks.GROUPED)
def test_experts_run_all_at_once(kind: type[nn.Module]) -> None:
    model = make(kind)
    (loop,) = watched(model).found
    assert (loop.name, loop.reason) == ("block", "")
    assert isinstance(model.block, GroupedExperts)
    compare(model.block, kind)


@pytest.mark.parametrize("kind", [blocks.Mixtral, blocks.EveryExpert])
def test_bfloat16(kind: type[nn.Module]) -> None:
    model = make(kind, torch.bfloat16)
    (loop,) = watched(model).found
    assert not loop.reason
    compare(model.block, kind, tolerance=2e-2)


REFUSED = {
    blocks.ExpertChoice: "no tensor was found that says which experts a token goes to",
    blocks.Capacity: "all at once, it would not give the same for 1x512 tokens",
    blocks.NotLinear: "what they give is not added up for each token",
    blocks.Noisy: "what they give is not added up for each token",
    blocks.Threshold: "its choice of experts does not decide alone",
    blocks.Looks: "its code looks at numbers",
    blocks.Together: "its code takes the weights of several experts together",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_code_runs_as_written(kind: type[nn.Module]) -> None:
    model = make(kind)
    (loop,) = watched(model).found
    assert REFUSED[kind] in loop.reason
    assert type(model.block) is kind


@pytest.mark.parametrize(
    ("kind", "depends"),
    [(blocks.ExpertChoice, True), (blocks.Capacity, True), (blocks.NotLinear, False), (blocks.Masks, False)],
)
def test_tokens_that_depend_on_others_are_seen(kind: type[nn.Module], depends: bool) -> None:
    assert watched(make(kind)).crowded == (["block"] if depends else [])


@pytest.mark.parametrize("kind", [blocks.Unlike, blocks.Chain])
def test_what_is_no_loop_is_not_reported(kind: type[nn.Module]) -> None:
    model = make(kind)
    assert not watched(model).found
    assert type(model.block) is kind


def test_blocks_of_one_kind_have_experts_of_their_own() -> None:
    model = nn.Sequential(make(blocks.Mixtral), Around(blocks.Mixtral)).eval().requires_grad_(False)
    assert watched(model).grouped == ["0.block", "1.block"]
    for around in model:
        compare(around.block, blocks.Mixtral)


def test_in_one_product_where_the_device_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: all matrices of a kind as one tensor."""
    shapes = []
    multiply = F.grouped_mm

    def noting(rows: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
        shapes.append(matrices.shape)
        return multiply(rows, matrices, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", noting)
    for module in ("layers.grouped_linear", "experts.loops"):
        monkeypatch.setattr(f"shardwright.{module}.multiplies_grouped", lambda matrix: True)
    for kind in (blocks.Mixtral, blocks.Stacked):
        model = make(kind)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert watched(model).grouped
        shapes.clear()
        compare(model.block, kind)
        assert {shape[0] for shape in shapes} == {blocks.NUM_EXPERTS}
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_undone_it_runs_as_written() -> None:
    model = make(blocks.Shared)
    loops = watched(model)
    loops.undo("tokens differ")
    assert type(model.block) is blocks.Shared
    assert [loop.reason for loop in loops.found] == ["tokens differ"]


def test_nothing_changes_if_it_must_not() -> None:
    model = make(blocks.Shared)
    assert [loop.reason for loop in watched(model, unless="its weights are quantized").found] == [
        "its weights are quantized"
    ]
    assert type(model.block) is blocks.Shared


def test_another_call_runs_as_written() -> None:
    """With an argument that it was not watched with."""
    model = make(blocks.Shared)
    watched(model)
    ran = []
    model.block.experts[0].register_forward_hook(lambda *_: ran.append(True))
    x = torch.zeros(1, 3, WIDTH)  # the choice is that of the router's bias alone
    with torch.inference_mode():
        usual = model.block(x)
        assert not ran
        torch.testing.assert_close(model.block(x, is_last=True), usual)
    chosen = model.block.gate(x[0])[1]
    assert bool(ran) == bool((chosen == 0).any())
