"""Arrays arrive as they are, in one piece of memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardwright.attention.arrays import ArrayBuffer, on_device

CPU = torch.device("cpu")
ARRAYS = [np.arange(3), np.arange(10, dtype=np.int32).reshape(2, 5)[:, :3], np.ones((0, 2), np.float32)]


def test_arrays_become_tensors() -> None:
    for array, tensor in zip(ARRAYS, on_device(ARRAYS, CPU), strict=True):
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype


def test_a_buffer_is_filled_again_in_place() -> None:
    buffer = ArrayBuffer(ARRAYS, CPU)
    for array, tensor in zip(ARRAYS, buffer.tensors, strict=True):
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
        assert tensor.data_ptr() % 16 == 0 or not tensor.numel()
    places = [tensor.data_ptr() for tensor in buffer.tensors]
    buffer.fill([array + 1 for array in ARRAYS])
    assert [tensor.data_ptr() for tensor in buffer.tensors] == places
    for array, tensor in zip(ARRAYS, buffer.tensors, strict=True):
        assert np.array_equal(tensor.numpy(), array + 1)


def test_a_buffer_takes_no_other_shapes() -> None:
    buffer = ArrayBuffer(ARRAYS, CPU)
    with pytest.raises(AssertionError, match="another shape"):
        buffer.fill([ARRAYS[0][:2], *ARRAYS[1:]])
