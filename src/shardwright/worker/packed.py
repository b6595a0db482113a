"""Steps on the paged cache: all sequences packed into one forward pass.

Should the model's code do in some step what it did not do when it was looked at, then what is in the cache is of no
use, and the model serves on without it. Sequences with token ids that its code treats in a way of its own, such as one
for padding, are computed whole, and do not meet the others.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from shardwright.adapt.intercepted_model import InterceptedModel
from shardwright.adapt.probe import set_attention
from shardwright.adapt.served_model import ServedModel
from shardwright.attention.kv_cache import FLOAT8, KVCache
from shardwright.attention.layout import AttentionBackend, CapturableBackend
from shardwright.attention.native import NativeBackend
from shardwright.cache.spec import bytes_per_block
from shardwright.errors import ConfigError, UnsupportedModelError
from shardwright.foreign_errors import described
from shardwright.replay.program import OutOfRangeError, Program
from shardwright.replay.record import Recorder, record
from shardwright.worker.graphs import DecodeGraphs, Shape, capture_on
from shardwright.worker.inputs import build_inputs
from shardwright.worker.per_request import RecomputingModel
from shardwright.worker.special_ids import without_special_ids
from shardwright.worker.step import Ints, StepTables, wanted_places

logger = logging.getLogger(__name__)

FEW_TOKENS = 8
"""Of a sequence in a step: as many as a decode may have that verifies what was guessed ahead."""


class PackedModel:
    """Implements StepModel for models whose attention is ours.

    Args:
        served: the model, weights loaded.
        backend: computes its attention.
        dtype: of keys and values.
        device: of model and cache.
        max_step_tokens: most tokens that its code takes at once, if it has tables of a fixed length.
        may_recompute: whether it serves on without its cache if need be; a rank must not do so by itself.
    """

    takes_chunks = True
    reuses_prefixes = True
    can_rewind = True
    bytes_per_row = 0

    def __init__(
        self,
        served: ServedModel | InterceptedModel,
        backend: AttentionBackend,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_step_tokens: int | None = None,
        may_recompute: bool = True,
    ) -> None:
        self.served = served
        self.rung, self.rung_reason = served.rung, served.rung_reason
        self.layers, self.groups = served.layers, served.groups
        self.max_step_tokens = max_step_tokens
        self._may_recompute = may_recompute
        self._backend = backend
        self._dtype = self._cache_dtype = dtype
        self._device = device
        self._cache: KVCache | None = None
        self._recomputing: RecomputingModel | None = None
        self._program: Program | None = None
        self._graphs: DecodeGraphs | None = None
        self._has_latents = any(spec.values_in_keys for spec in self.layers)
        self.batches_own = isinstance(served, ServedModel) and served.own is not None and served.own.together
        """Whether decodes of several lengths are given as a batch to code that attends by itself."""
        self.special_ids: list[int] = served.special_ids if isinstance(served, InterceptedModel) else []
        """Token ids that may not be computed with others: to be set before it serves."""
        self.is_chosen = False
        """Whether it is the rung that serves, not one that is being tried: until then, a failure is one."""

    @property
    def runs_on_triton(self) -> bool:
        """Whether Triton's kernels compute its attention, so that others of them can compute more."""
        return isinstance(self._backend, CapturableBackend)

    @property
    def program(self) -> Program | None:
        """Its steps as recorded; None if they run the model's code."""
        return self._program

    def bytes_per_block(self, block_size: int) -> int:
        element_bytes = self._cache_dtype.itemsize
        size = bytes_per_block(self.layers, self.groups, block_size=block_size, element_bytes=element_bytes)
        return max(size, 1)  # a pipeline stage may have no attention

    def allocate(self, *, num_rows: int, num_blocks: int, block_size: int) -> None:
        self._cache = KVCache(
            self.layers,
            self.groups,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=self._cache_dtype,
            device=self._device,
        )
        self._graphs = None  # they write to the cache that was
        if self._program is not None:
            self._program.bind(self._cache)

    def store_in_8_bits(self) -> None:
        """Keep keys and values as numbers of 8 bits, from the next `allocate` on. Raises ConfigError if it cannot."""
        asked = "kv_cache_dtype is fp8 but"
        if not self.runs_on_triton:
            raise ConfigError(f"{asked} only Triton's kernels read it: use --attention-backend triton, or a GPU")
        if self._has_latents:
            raise ConfigError(f"{asked} the model caches latents, for which there is no such cache")
        if any(spec.is_own for spec in self.layers):
            raise ConfigError(f"{asked} attention of the model's own code reads what it keeps bit by bit")
        self._cache_dtype = FLOAT8

    def record(self, *, num_positions: int, vocab_size: int, most_tokens: int, most_rows: int) -> str | None:
        """Record the model's steps, to be carried out natively from the next `allocate` on.

        Args:
            num_positions: longest sequence.
            vocab_size: number of token ids.
            most_tokens, most_rows: of a step, and of those whose logits are wanted; larger steps run the model's code.

        Returns: why that cannot be; None if it can.
        """
        if not isinstance(self._backend, NativeBackend):
            return "steps are recorded for native kernels, and others compute its attention"
        if isinstance(self.served, ServedModel) and self.served.own is not None:
            return self.served.own.describe()
        recorder = Recorder(
            self.served,
            self._backend,
            num_positions=num_positions,
            vocab_size=vocab_size,
            dtype=self._dtype,
            most_tokens=most_tokens,
            most_rows=most_rows,
        )
        found = record(recorder)
        if isinstance(found, str):
            return found
        self._program = found
        return None

    def capture(self, *, max_num_seqs: int, max_model_len: int, vocab_size: int) -> str | None:
        """Capture decode steps on the cache as allocated, to be replayed from now on.

        Args:
            max_num_seqs: most sequences of a step.
            max_model_len: most tokens of a sequence.
            vocab_size: number of token ids.

        Returns: why that cannot be, in part or at all; None if it can.
        """
        assert self._cache is not None, "allocate comes first"
        cache, capture = self._cache, capture_on(self._device)
        if capture is None or not isinstance(self._backend, CapturableBackend):
            return f"there are no graphs on {self._device}"
        if isinstance(self.served, ServedModel) and self.served.own is not None:
            return self.served.own.describe()
        shape = Shape(
            groups=self.groups,
            block_size=self._backend.block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            num_blocks=cache.num_blocks,
            vocab_size=vocab_size,
            dtype=self._dtype,
        )
        cache.fill(seed=0)  # code that gets positions wrong shows where contexts are not all alike
        self._graphs = DecodeGraphs(
            lambda inputs: self.served.forward(inputs, cache, self._backend),
            self._backend,
            shape,
            device=self._device,
            capture=capture,
        )
        return self._graphs.capture_all()

    def fill(self, seed: int) -> None:
        """Write random numbers to the cache of keys and values."""
        assert self._cache is not None, "allocate comes first"
        self._cache.fill(seed)

    def compute(self, step: StepTables) -> Tensor:
        if self._recomputing is None and self.special_ids:
            ordinary, has_special = without_special_ids(step, self.special_ids)
            logits = self._compute(ordinary)
            return self._with_whole_sequences(logits, step, has_special) if any(has_special) else logits
        return self._compute(step)

    def _compute(self, step: StepTables) -> Tensor:
        assert self._cache is not None, "allocate comes first"
        if self._recomputing is None:
            if self._graphs is not None and self._graphs.takes(step):
                return self._graphs.run(step)
            inputs = build_inputs(step, groups=self.groups, backend=self._backend, device=self._device)
            if self._program is not None and self._repeats(step):
                try:
                    return self._program.run(inputs)
                except OutOfRangeError:
                    logger.warning("from now on the model's own code runs in every step: a table in it has grown")
                    self._program = None
            try:
                return self.served.forward(inputs, self._cache, self._backend)
            except Exception as exc:  # of the module's code, which may fail in any way; memory may be freed
                if (
                    not self.is_chosen
                    or not self._may_recompute
                    or isinstance(exc, (MemoryError, torch.OutOfMemoryError))
                ):
                    raise
                reason = str(exc) if isinstance(exc, UnsupportedModelError) else described(exc)
                logger.warning("from now on every step computes whole sequences, one at a time: %s", reason)
                self.served.forget()
                set_attention(self.served.module, "eager")
                self._graphs = None
                self._recomputing = RecomputingModel(self.served.module, reason, device=self._device)
        return self._recomputing.compute(step)

    def _repeats(self, step: StepTables) -> bool:
        """Whether a step can be carried out as recorded; latents are read as by decodes, which is slow for prompts."""
        assert self._program is not None
        is_known = not self._has_latents or bool(((step.num_tokens <= FEW_TOKENS) & (step.num_computed > 0)).all())
        return is_known and self._program.takes(int(step.num_tokens.sum()), len(step.logits_rows))

    def _with_whole_sequences(self, logits: Tensor, step: StepTables, is_whole: list[bool]) -> Tensor:
        """The logits of a step, those of some of its sequences computed by the module's own forward pass."""
        recomputing = RecomputingModel(self.served.module, "", device=self._device)
        self.served.forget()
        logits, row = logits.clone(), 0
        for i, (wanted, whole) in enumerate(zip(wanted_places(step), is_whole, strict=True)):
            if whole and len(wanted):
                logits[row : row + len(wanted)] = recomputing.compute(step.of(i, wanted))
            row += len(wanted)
        return logits

    def release(self, rows: list[int]) -> None:
        """Nothing to do: blocks are the scheduler's."""

    def scrub(self, blocks: list[Ints]) -> None:
        assert self._cache is not None, "allocate comes first"
        for group in blocks:
            self._cache.scrub(torch.from_numpy(group).to(self._device))
