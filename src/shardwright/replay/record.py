"""Record the decode steps of a served model."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardwright.adapt.intercepted_model import InterceptedModel
from shardwright.adapt.paged import ForwardInputs
from shardwright.adapt.served_model import ServedModel
from shardwright.attention.kv_cache import KVCache
from shardwright.attention.layout import StepLayout
from shardwright.attention.native import NativeBackend
from shardwright.errors import UnsupportedModelError
from shardwright.foreign_errors import described
from shardwright.replay.affine import common_recording
from shardwright.replay.program import Program
from shardwright.replay.trace import Trace, TracedBackend, TracedCache, TraceMode

logger = logging.getLogger(__name__)

SIZES = (2, 3, 5)
"""Steps that are compared."""
CHECKED = (1, 4, 7)
"""Decodes of steps for which logits are compared; one token alone is what code may treat in a way of its own."""
CHECKED_PROMPT = 5
"""Tokens of a prompt for which they are, as many as fit in a block."""
MOST_POSITIONS = 2048
"""Of recorded steps."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Root mean square of the differences between logits, against their standard deviation: rounding alone."""


class Recorder:
    """Makes a program of a model's decode steps.

    Args:
        served: the model, weights loaded, on the CPU.
        backend: of its attention.
        num_positions: longest sequence.
        vocab_size: number of token ids.
        dtype: of keys and values.
        most_tokens, most_rows: of a step, and of those whose logits are wanted.
    """

    def __init__(
        self,
        served: ServedModel | InterceptedModel,
        backend: NativeBackend,
        *,
        num_positions: int,
        vocab_size: int,
        dtype: torch.dtype,
        most_tokens: int,
        most_rows: int,
    ) -> None:
        self._served = served
        self._backend = backend
        self._num_positions = min(num_positions, MOST_POSITIONS)
        self._vocab_size = vocab_size
        self._dtype = dtype
        self._most_tokens, self._most_rows = most_tokens, most_rows
        self._generator = np.random.default_rng(0)
        self._cache = KVCache(
            served.layers,
            served.groups,
            num_blocks=(max(CHECKED) + 1) * len(served.groups),
            block_size=backend.block_size,
            dtype=dtype,
            device=torch.device("cpu"),
        )

    def program(self) -> Program:
        """All steps of decodes, and of prompts where that can be.

        Raises: UnsupportedModelError if some step cannot be repeated, with the reason.
        """
        self._plain(self._inputs(2))  # what code makes once and keeps is made
        traces = [self._trace(count) for count in SIZES]
        recording = common_recording(traces)
        program = Program(recording, most_tokens=self._most_tokens, most_rows=self._most_rows)
        del traces
        program.bind(self._cache)
        steps = [self._inputs(count) for count in CHECKED if count <= self._most_rows]
        prompt = self._prompt(min(CHECKED_PROMPT, self._backend.block_size, self._most_tokens))
        if program.takes(len(prompt.input_ids), len(prompt.logits_rows)):
            steps.append(prompt)
        for inputs in steps:
            expected = self._plain(inputs).float()
            actual = program.run(inputs).float()
            difference = float((expected - actual).square().mean().sqrt() / expected.std().clamp_min(1e-6))
            if not difference <= TOLERANCE[self._dtype]:
                raise UnsupportedModelError(f"repeated, its logits differ by {difference:.2g} of their spread")
        return program

    def _plain(self, inputs: ForwardInputs) -> Tensor:
        return self._served.forward(inputs, self._cache, self._backend)

    def _trace(self, num_tokens: int) -> Trace:
        inputs = self._inputs(num_tokens)
        mode = TraceMode(num_tokens)
        for name in ("input_ids", "position_ids", "logits_rows"):
            mode.trace.inputs[name] = mode.look_at(getattr(inputs, name)).storage
        cache, backend = TracedCache(self._cache, mode), TracedBackend(self._backend, mode)
        with mode:
            logits = self._served.forward(inputs, cache, backend)  # type: ignore[arg-type]
        mode.trace.output = mode.look_at(logits)
        return mode.trace

    def _inputs(self, num_tokens: int) -> ForwardInputs:
        """Random tokens of as many sequences at random positions."""
        positions = self._generator.integers(1, self._num_positions, num_tokens)
        layout = StepLayout(positions, np.ones(num_tokens, dtype=np.int64), np.arange(num_tokens + 1))
        return self._step(layout, positions, np.arange(num_tokens))

    def _prompt(self, num_tokens: int) -> ForwardInputs:
        """Random tokens of one sequence that begins."""
        layout = StepLayout(np.array([0]), np.array([num_tokens]), np.array([0, num_tokens]))
        return self._step(layout, np.arange(num_tokens), np.array([num_tokens - 1]))

    def _step(
        self, layout: StepLayout, positions: npt.NDArray[np.int64], logits_rows: npt.NDArray[np.int64]
    ) -> ForwardInputs:
        """All blocks of a sequence are the same one."""
        block_size, groups = self._backend.block_size, self._served.groups
        num_tokens, num_sequences = len(positions), len(layout.num_tokens)
        own = 1 + np.arange(num_sequences, dtype=np.int32)[:, None]
        shape = (num_sequences, -(-self._num_positions // block_size))
        tables = [np.broadcast_to(own + group * max(CHECKED), shape).copy() for group in range(len(groups))]
        sequence = np.repeat(np.arange(num_sequences), layout.num_tokens)
        slots = [
            torch.from_numpy(table[sequence, 0].astype(np.int64) * block_size + positions % block_size)
            for table in tables
        ]
        return ForwardInputs(
            input_ids=torch.from_numpy(self._generator.integers(0, self._vocab_size, num_tokens)),
            position_ids=torch.from_numpy(positions.copy()),
            slot_mappings=slots,
            plans=[
                self._backend.prepare(layout, table, group.visibility)
                for table, group in zip(tables, groups, strict=True)
            ],
            logits_rows=torch.from_numpy(logits_rows),
            layout=layout,
            block_tables=tables,
        )


@torch.inference_mode()
def record(recorder: Recorder) -> Program | str:
    """A model's decode steps, or why they cannot be repeated."""
    try:
        return recorder.program()
    except UnsupportedModelError as exc:
        return str(exc)
    except Exception as exc:  # of the model's code, under a mode that its author never thought of
        return described(exc)
