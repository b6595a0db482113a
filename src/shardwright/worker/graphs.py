"""Decode steps captured once for each of some numbers of sequences, and replayed: no Python, no launches one by one.

A graph repeats the same work on the same memory. So a step's arrays are copied to where the graph's inputs lie, and a
step of fewer sequences than the graph was captured for is filled up: with sequences of one token whose key goes to the
null block, where nobody reads it. A model's code may decide something by what it was given at capture; therefore a
graph is used only if, replayed on other tokens, it gives what the code itself gives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.adapt.paged import ForwardInputs
from shardwright.attention.arrays import ArrayBuffer
from shardwright.attention.layout import CapturableBackend, StepLayout, decodes
from shardwright.cache.spec import CacheGroup
from shardwright.worker.self_check import compare_logits
from shardwright.worker.step import StepTables

logger = logging.getLogger(__name__)

TRIAL_BLOCKS = 4
"""Most blocks of a sequence of the steps that a graph is captured and tried with."""


class Capture(Protocol):
    """Makes work repeatable."""

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Do some work on tensors that stay where they are.

        Returns: what does the same again, and gives a tensor that is overwritten by the next time.
        """
        ...


class CudaCapture:
    """CUDA graphs, which share memory as they never run at the same time.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()  # kernels are compiled and libraries make their workspaces at the first call
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = work()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def capture_on(device: torch.device) -> Capture | None:
    """What captures work on a device; None if nothing does."""
    return CudaCapture(device) if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class Shape:
    """What all steps of the model have in common."""

    groups: list[CacheGroup]
    block_size: int
    max_num_seqs: int
    max_model_len: int
    num_blocks: int
    """That the trials may write to: nobody owns one yet."""
    vocab_size: int
    dtype: torch.dtype
    """Of the model."""

    @property
    def max_blocks(self) -> int:
        """Of a sequence."""
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True, slots=True)
class Captured:
    """Steps of one number of sequences."""

    buffer: ArrayBuffer
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """Repeats decode steps.

    Args:
        forward: the model's forward pass, on its cache; what it gives for an input depends on that and the cache alone.
        backend: computes its attention.
        shape: of the steps.
        device: of the model.
        capture: makes the forward pass repeatable.
    """

    def __init__(
        self,
        forward: Callable[[ForwardInputs], Tensor],
        backend: CapturableBackend,
        shape: Shape,
        *,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._forward = forward
        self._backend = backend
        self._shape = shape
        self._device = device
        self._capture = capture
        self._captured: dict[int, Captured] = {}

    def capture_all(self) -> str | None:
        """Capture steps of every size that the cache has room for. Returns: why some are missing; None if none are."""
        for size in reversed(sizes_up_to(self._shape.max_num_seqs)):  # smaller ones find room in what larger ones took
            if self._trial_length(size) < 2:
                continue  # no step is ever that large
            try:
                self._captured[size] = self._make(size)
            except Exception as exc:  # of the model's code, which may do what cannot be captured
                return f"decodes of {size} sequences are not captured: {type(exc).__name__}: {exc}"
        return None

    def takes(self, step: StepTables) -> bool:
        """Whether a step is one of decodes, of a size that was captured."""
        num_sequences = len(step.rows)
        return (
            0 < num_sequences <= max(self._captured, default=0)
            and len(step.logits_rows) == num_sequences
            and bool(decodes(step.num_tokens, step.num_computed).all())
        )

    def run(self, step: StepTables) -> Tensor:
        """The logits of a step: [S, vocab_size], model dtype, overwritten by the next."""
        num_sequences = len(step.rows)
        captured = self._captured[min(size for size in self._captured if size >= num_sequences)]
        captured.buffer.fill(self._arrays(step, captured.buffer.tensors[0].shape[0]))
        return captured.replay()[:num_sequences]

    def _make(self, size: int) -> Captured:
        """Raises what the model's code does where it cannot be captured, or UnsupportedModelError if it differs."""
        buffer = ArrayBuffer(self._arrays(self._trial(size, seed=1), size), self._device)
        inputs = self._inputs(buffer.tensors, size)
        replay = self._capture(lambda: self._forward(inputs))
        buffer.fill(self._arrays(self._trial(size, seed=2), size))
        expected = self._forward(inputs).float()
        difference = compare_logits(expected, replay().float(), dtype=self._shape.dtype)
        logger.debug("decodes of %d sequences are captured; repeated, they differ by %.2g", size, difference)
        return Captured(buffer, replay)

    def _arrays(self, step: StepTables, size: int) -> list[npt.NDArray[np.generic]]:
        """What a step of `size` sequences reads, the last of which may be none: one token at position 0, in slot 0."""
        num_sequences, rows = len(step.rows), step.rows
        positions = _filled_up(step.num_computed, size)
        place, offset = np.divmod(step.num_computed, self._shape.block_size)
        arrays: list[npt.NDArray[np.generic]] = [
            _filled_up(step.token_rows[rows, step.num_computed].astype(np.int64), size),
            positions,
            np.arange(size),
            np.arange(size + 1, dtype=np.int32),
            np.arange(size, dtype=np.int32),
            positions.astype(np.int32),
        ]
        for table in step.block_tables:
            slots = table[rows, place].astype(np.int64) * self._shape.block_size + offset
            tables = np.zeros((size, self._shape.max_blocks), dtype=np.int32)
            tables[:num_sequences, : table.shape[1]] = table[rows]
            arrays += [_filled_up(slots, size), tables]
        return arrays

    def _inputs(self, tensors: list[Tensor], size: int) -> ForwardInputs:
        """The forward's inputs, made of tensors of what `_arrays` gives."""
        input_ids, position_ids, logits_rows, starts, sequence_N, computed, *by_group = tensors
        slot_mappings, tables = by_group[::2], by_group[1::2]
        ones = np.ones(size, dtype=np.int64)
        return ForwardInputs(
            input_ids=input_ids,
            position_ids=position_ids,
            slot_mappings=slot_mappings,
            plans=[
                self._backend.prepare_decodes(
                    table, starts, computed, sequence_N, group.visibility, longest=self._shape.max_model_len
                )
                for table, group in zip(tables, self._shape.groups, strict=True)
            ],
            logits_rows=logits_rows,
            layout=StepLayout(ones, ones, np.arange(size + 1)),
            block_tables=[np.zeros((size, self._shape.max_blocks), dtype=np.int32) for _ in tables],
        )

    def _trial_length(self, size: int) -> int:
        """Tokens of each sequence of a trial, as many as there are blocks for."""
        shape = self._shape
        blocks_each = min(shape.num_blocks // (size * max(len(shape.groups), 1)), TRIAL_BLOCKS)
        return min(blocks_each * shape.block_size, shape.max_model_len)

    def _trial(self, size: int, *, seed: int) -> StepTables:
        """Random tokens at random positions, in blocks of their own."""
        shape, generator = self._shape, np.random.default_rng(seed)
        length = self._trial_length(size)
        blocks_each = -(-length // shape.block_size)
        table = np.arange(1, size * blocks_each + 1, dtype=np.int32).reshape(size, blocks_each)
        return StepTables(
            token_rows=generator.integers(0, shape.vocab_size, (size, length), dtype=np.int32),
            block_tables=[table + group * table.size for group in range(len(shape.groups))],
            rows=np.arange(size),
            num_computed=generator.integers(1, length, size),
            num_tokens=np.ones(size, dtype=np.int64),
            logits_rows=np.arange(size),
        )


def sizes_up_to(max_num_seqs: int) -> list[int]:
    """Numbers of sequences that steps are captured for: powers of two, and the most there can be."""
    return [*(1 << power for power in range((max_num_seqs - 1).bit_length())), max_num_seqs]


def _filled_up(array: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    filled = np.zeros(size, dtype=np.int64)
    filled[: len(array)] = array
    return filled
