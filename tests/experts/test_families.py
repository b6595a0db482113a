from __future__ import annotations

import pytest
import torch
from tests.experts import blocks
from tests.experts.models import make_decoder
from torch import nn

from shardwright.experts.families import ParameterPlaces, find_families


@pytest.mark.parametrize("kind", blocks.GROUPED)
def test_experts_are_found(kind: type[nn.Module]) -> None:
    assert [family.num_experts for family in find_families(kind())] == [blocks.NUM_EXPERTS]


def test_layers_are_no_experts() -> None:
    found = find_families(make_decoder(blocks.Masks))
    assert [family.name for family in found] == [f"layers.{i}.block.experts" for i in range(2)]


def test_lists_of_single_matrices_are_one_family() -> None:
    (family,) = find_families(nn.Sequential(blocks.Nested()))
    assert family.name == "0"
    assert {name for name, _ in family.parameters} == {"first", "second"}


def test_a_view_of_a_parameter_is_known_by_its_place() -> None:
    stack = torch.zeros(3, 4, 5)
    places = ParameterPlaces({("", "stack"): list(stack)})
    view = stack[1].T
    assert places.find(view.data_ptr(), view.numel()) == (1, ("", "stack"))
    assert places.find(stack.data_ptr(), stack.numel()) is None  # all of them
    assert places.find(stack[1, 2].data_ptr(), 5) is None
    assert places.begins(stack[2].data_ptr())
    assert not places.begins(stack[2, 1].data_ptr())


def test_matrices_are_brought_together() -> None:
    block = blocks.Mixtral()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    (family,) = find_families(block)
    family.bring_together()
    experts = [expert.w2.weight for expert in block.experts]
    assert len({weight.untyped_storage().data_ptr() for weight in experts}) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
