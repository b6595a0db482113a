"""What is bound to each other, against the obvious way to find out."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.plans.flow.atoms import Atoms, distinct
from shardwright.plans.flow.memory import dimension_indices
from shardwright.plans.flow.record import Ref

PAIRS = st.lists(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12), max_size=5)


@given(st.lists(st.integers(-5, 20)))
def test_distinct_numbers_are_sorted_and_once(numbers: list[int]) -> None:
    for shape in ((-1,), (1, -1)):
        assert distinct(np.array(numbers, dtype=np.int64).reshape(shape)).tolist() == sorted(set(numbers))


@given(PAIRS)
def test_bound_atoms_are_found_by_the_least(batches: list[list[tuple[int, int]]]) -> None:
    atoms, sets = Atoms(), [{i} for i in range(21)]
    atoms.new(20)
    for batch in batches:
        atoms.bind(*np.array(batch, dtype=np.int64).T)
        for a, b in batch:
            merged = next(s for s in sets if a in s) | next(s for s in sets if b in s)
            sets = [s for s in sets if not s & merged] + [merged]
    least = [min(next(s for s in sets if i in s)) for i in range(21)]
    assert atoms.find(np.arange(21)).tolist() == least
    assert atoms.find(np.array([-3])).tolist() == [-3]


def test_needs_are_of_what_is_bound_now() -> None:
    atoms = Atoms()
    a, b, c = atoms.new(3)
    atoms.need(np.array([a, b]), np.array([c, c]))
    atoms.bind(np.array([a]), np.array([b]))
    assert atoms.needs().tolist() == [[a], [c]]
    atoms.bind(np.array([a]), np.array([c]))
    assert atoms.needs().shape == (2, 0)


@given(st.data())
def test_indices_of_a_view(data: st.DataObject) -> None:

    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    root = torch.arange(int(np.prod(shape))).view(shape)
    view = root
    for step in data.draw(st.lists(st.sampled_from(["flip", "slice", "split", "flat", "row", "new"]), max_size=4)):
        if step == "flip" and view.ndim > 1:
            view = view.transpose(0, -1)
        elif step == "slice" and view.shape[0] > 2:
            view = view[1:-1]
        elif step == "split" and view.shape[-1] % 2 == 0:
            view = view.unflatten(-1, (view.shape[-1] // 2, 2))
        elif step == "flat" and view.is_contiguous():
            view = view.view(-1)
        elif step == "row" and view.ndim > 1:
            view = view[0]
        elif step == "new":
            view = view[None]
    places = dimension_indices(ref(root), ref(view))
    assert places is not None
    expected = np.unravel_index(view.numpy(), shape)
    for found, wanted in zip(places, expected, strict=True):
        assert (np.broadcast_to(found, view.shape) == wanted).all()


def ref(tensor: torch.Tensor) -> Ref:
    """The place of a tensor."""
    return Ref(0, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), 0, is_integral=True)
