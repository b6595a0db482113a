"""Record the decode steps of a served model."""

from __future__ import annotations

import logging

import numpy as np
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

MOST_TOKENS = 64
"""Larger steps are busy with products that PyTorch does as well."""
SIZES = (2, 3, 5)
"""Steps that are compared."""
CHECKED = (1, 4, 7)
"""Steps for which logits are compared; one token alone is what code may treat in a way of its own."""
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
    """

    def __init__(
        self,
        served: ServedModel | InterceptedModel,
        backend: NativeBackend,
        *,
        num_positions: int,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._served = served
        self._backend = backend
        self._num_positions = min(num_positions, MOST_POSITIONS)
        self._vocab_size = vocab_size
        self._dtype = dtype
        self._generator = np.random.default_rng(0)
        self._cache = KVCache(
            served.layers,
            served.groups,
            num_blocks=2 * len(served.groups),
            block_size=backend.block_size,
            dtype=dtype,
            device=torch.device("cpu"),
        )

    def program(self) -> Program:
        """All decode steps up to MOST_TOKENS.

        Raises: UnsupportedModelError if some step cannot be repeated, with the reason.
        """
        self._plain(self._inputs(2))  # what code makes once and keeps is made
        traces = [self._trace(count) for count in SIZES]
        program = Program(common_recording(traces), most_tokens=MOST_TOKENS)
        del traces
        program.bind(self._cache)
        for count in CHECKED:
            inputs = self._inputs(count)
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
        """Random tokens at random positions; all blocks of a sequence are the same one."""
        block_size, groups = self._backend.block_size, self._served.groups
        positions = self._generator.integers(1, self._num_positions, num_tokens)
        ones = np.ones(num_tokens, dtype=np.int64)
        layout = StepLayout(positions, ones, np.arange(num_tokens + 1))
        blocks = -(-self._num_positions // block_size)
        tables = [np.full((num_tokens, blocks), 1 + group, dtype=np.int32) for group in range(len(groups))]
        slots = [torch.from_numpy(table[:, 0] * block_size + positions % block_size) for table in tables]
        return ForwardInputs(
            input_ids=torch.from_numpy(self._generator.integers(0, self._vocab_size, num_tokens)),
            position_ids=torch.from_numpy(positions.copy()),
            slot_mappings=slots,
            plans=[
                self._backend.prepare(layout, table, group.visibility)
                for table, group in zip(tables, groups, strict=True)
            ],
            logits_rows=torch.arange(num_tokens),
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
