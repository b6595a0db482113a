"""Links between pipeline stages over process groups: a rank gives to the rank of the next stage that stands where it
stands.

A message is two: sizes, always as many numbers, then the bytes of all tensors.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool, torch.uint8, torch.int8,
    torch.int16, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip

HEADER_LENGTH = 512
"""Numbers in a message's header: how many tensors, and of each its type, whether it is on "meta", its shape."""

ALIGNMENT = 16
"""Of the bytes of each tensor."""

MOST_UNDER_WAY = 8
"""Halves of messages that may be on their way before a sender waits for the oldest. Gloo says that a send is over only
to those who wait for it, and what is sent takes memory until then."""


class RankLink:
    """Implements plans.links.StageLink, as one end of it: a rank sends or receives.

    Tensors on "meta" arrive as such: code is looked at before it has weights.

    Args:
        peer: number of the rank at the other end.
        device: of what is received.
    """

    def __init__(self, peer: int, device: torch.device) -> None:
        self._peer = peer
        self._device = device
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()

    @property
    def num_under_way(self) -> int:
        """Halves of messages that may not have been received yet, and are kept."""
        return len(self._under_way)

    def send(self, tensors: list[Tensor]) -> None:
        """Give tensors away. It waits for no receiver that is less than a few messages behind.

        Receivers take all messages that come, whatever becomes of them, so there is an end to the wait.
        """
        self._start(described(tensors))
        if any(size_of(t) for t in tensors):
            self._start(torch.cat([padded(t) for t in tensors if size_of(t)]))

    def recv(self) -> list[Tensor]:
        """The tensors of the oldest message; waits for it."""
        header = torch.empty(HEADER_LENGTH, dtype=torch.int64)
        dist.recv(header, self._peer)
        tensors = undescribed(header.tolist(), self._device)
        if num_bytes := sum(size_of(t) for t in tensors):
            data = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            dist.recv(data, self._peer)
            place = 0
            for index, tensor in enumerate(tensors):
                if size := size_of(tensor):
                    part = data[place : place + tensor.nbytes]
                    tensors[index] = part.view(tensor.dtype).view(tensor.shape)
                    place += size
        return tensors

    def _start(self, tensor: Tensor) -> None:
        while len(self._under_way) >= MOST_UNDER_WAY:
            self._under_way.popleft()[0].wait()
        work = dist.isend(tensor, self._peer)
        assert work is not None
        self._under_way.append((work, tensor))


def size_of(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a message."""
    return 0 if tensor.is_meta else -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def padded(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(data, (0, size_of(tensor) - tensor.nbytes))


def described(tensors: list[Tensor]) -> Tensor:
    """The header of a message."""
    numbers = [len(tensors)]
    for tensor in tensors:
        numbers += [DTYPES.index(tensor.dtype), int(tensor.is_meta), tensor.ndim, *tensor.shape]
    if len(numbers) > HEADER_LENGTH:
        raise ValueError(f"{len(tensors)} tensors are handed over, too many for one message")
    return torch.tensor(numbers + [0] * (HEADER_LENGTH - len(numbers)))


def undescribed(numbers: list[int], device: torch.device) -> list[Tensor]:
    """Empty tensors as a header describes them."""
    tensors, place = [], 1
    for _ in range(numbers[0]):
        dtype, is_meta, ndim = numbers[place : place + 3]
        shape = numbers[place + 3 : place + 3 + ndim]
        place += 3 + ndim
        on = torch.device("meta") if is_meta else device
        tensors.append(torch.empty(shape, dtype=DTYPES[dtype], device=on))
    return tensors
