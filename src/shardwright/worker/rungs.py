"""The rungs of the ladder, best first, and how a module gets onto each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from shardwright.adapt.intercepted_model import InterceptedModel
from shardwright.adapt.remembered import Remembered
from shardwright.adapt.rungs import AttentionRung
from shardwright.adapt.served_model import ServedModel
from shardwright.attention.layout import AttentionBackend
from shardwright.config import ParallelConfig
from shardwright.worker.packed import PackedModel
from shardwright.worker.per_request import PerRequestModel, RecomputingModel
from shardwright.worker.state_slots import StateSlotModel
from shardwright.worker.step import StepModel


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to serve a module."""

    name: AttentionRung
    build: Callable[..., StepModel]
    """Given why no better rung would do, makes the model, without its cache; raises if the module cannot stand here.

    Those whose attention is paged take `expanded_because` too: why keys and values are cached, and not latents."""


def batched_rungs(
    module: nn.Module,
    backend: AttentionBackend,
    *,
    num_positions: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    parallel: ParallelConfig | None,
    agree: Callable[[bool], bool],
    fresh: Remembered,
) -> list[Rung]:
    """Those on which requests are computed together; arguments as of `ladder.climb`.

    Args:
        backend: computes attention.
        fresh: what the module's code keeps, before it ran.
    """
    is_alone = parallel is None or parallel.num_ranks == 1
    is_whole = parallel is None or parallel.pipeline_parallel_size == 1  # one of several stages may have no attention

    def packed(
        reason: str, *, expanded_because: str = "", own_rows: torch.dtype | None = None, own_together: bool = True
    ) -> StepModel:
        served = ServedModel(
            module,
            num_positions=num_positions,
            needs_attention=is_whole,
            expanded_because=expanded_because,
            own_rows=own_rows,
            own_together=own_together,
            agree=agree,
        )
        return PackedModel(served, backend, dtype=dtype, device=device, may_recompute=is_alone)

    def intercepted(reason: str, *, expanded_because: str = "") -> StepModel:
        served = InterceptedModel(
            module,
            num_positions=num_positions,
            vocab_size=vocab_size,
            fresh=fresh,
            needs_attention=is_whole,
            expanded_because=expanded_because,
            agree=agree,
        )
        return PackedModel(
            served, backend, dtype=dtype, device=device, max_step_tokens=num_positions, may_recompute=is_alone
        )

    def with_state(
        reason: str,
        *,
        expanded_because: str = "",
        takes_chunks: bool = True,
        decodes_together: bool = True,
        own_rows: torch.dtype | None = None,
    ) -> StepModel:
        return StateSlotModel(
            module,
            backend,
            num_positions=num_positions,
            vocab_size=vocab_size,
            dtype=dtype,
            device=device,
            takes_chunks=takes_chunks,
            decodes_together=decodes_together,
            expanded_because=expanded_because,
            own_rows=own_rows,
            agree=agree,
        )

    captured = [Rung(AttentionRung.INTERFACE, packed), Rung(AttentionRung.DATAFLOW, intercepted)]
    own = [
        Rung(AttentionRung.INTERFACE, partial(packed, own_rows=dtype, own_together=together))
        for together in ([True, False] if is_whole else [])
    ]
    ways_with_state: list[dict[str, Any]] = [{}, {"takes_chunks": False}, {"decodes_together": False}]
    ways_with_state += [way | {"own_rows": dtype} for way in ways_with_state] if is_whole else []
    return [*captured, *own, *(Rung(AttentionRung.STATE, partial(with_state, **way)) for way in ways_with_state)]


def single_rungs(module: nn.Module, *, device: torch.device, parallel: ParallelConfig | None) -> list[Rung]:
    """Those on which requests are computed one by one."""
    is_whole = parallel is None or parallel.pipeline_parallel_size == 1
    return [
        Rung(AttentionRung.PER_REQUEST, partial(PerRequestModel, module, device=device, is_whole=is_whole)),
        Rung(AttentionRung.RECOMPUTE, partial(RecomputingModel, module, device=device)),
    ]
