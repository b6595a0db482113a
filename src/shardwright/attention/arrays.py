"""Arrays of a step on their way to the device: all in one copy, which the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: what a load of several numbers at once wants, whichever type they are of."""


class ArrayBuffer:
    """Memory on a device for arrays of fixed types and shapes, filled again and again.

    Args:
        arrays: of the types and shapes; what they hold is copied.
        device: of the memory.
    """

    def __init__(self, arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> None:
        self._places, size = _places(arrays)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.tensors = [_view(self._memory, place, array) for place, array in zip(self._places, arrays, strict=True)]
        self.fill(arrays)

    def fill(self, arrays: Sequence[npt.NDArray[np.generic]]) -> None:
        """Copy other arrays of the same types and shapes to where the tensors are."""
        for array, tensor in zip(arrays, self.tensors, strict=True):
            assert tensor.shape == array.shape, "an array of another shape than the buffer was made for"
        self._memory.copy_(_packed(arrays, self._places, len(self._memory), self._memory.device), non_blocking=True)


def on_device(arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Tensors of arrays, in one copy. On a CPU they share memory with the arrays."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    places, size = _places(arrays)
    memory = _packed(arrays, places, size, device).to(device, non_blocking=True)
    return [_view(memory, place, array) for place, array in zip(places, arrays, strict=True)]


def _places(arrays: Sequence[npt.NDArray[np.generic]]) -> tuple[list[int], int]:
    """Where each array begins, in bytes, and the size of all."""
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    ends = np.cumsum([0, *sizes]).tolist()
    return ends[:-1], ends[-1]


def _packed(arrays: Sequence[npt.NDArray[np.generic]], places: list[int], size: int, device: torch.device) -> Tensor:
    """The arrays' bytes, in memory that the device can read by itself; torch keeps it until the copy is done."""
    packed = np.empty(size, dtype=np.uint8)
    for array, place in zip(arrays, places, strict=True):
        packed[place : place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    memory = torch.from_numpy(packed)
    return memory.pin_memory() if device.type == "cuda" else memory


def _view(memory: Tensor, place: int, array: npt.NDArray[np.generic]) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return memory[place : place + array.nbytes].view(dtype).view(array.shape)
