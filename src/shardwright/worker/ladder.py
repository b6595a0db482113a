"""Climb down the ladder: the best way to serve a module that gives its own logits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shardwright.adapt.far_positions import far_position_turns_others
from shardwright.adapt.intercepted_model import InterceptedModel
from shardwright.adapt.probe import set_attention
from shardwright.adapt.remembered import Remembered
from shardwright.adapt.rungs import AttentionRung
from shardwright.attention.choice import choose_backend, make_backend
from shardwright.config import ParallelConfig
from shardwright.errors import EngineError, ShardwrightError, UnsupportedModelError
from shardwright.experts.loops import ExpertLoops
from shardwright.foreign_errors import described
from shardwright.worker.batch_check import check_batches
from shardwright.worker.packed import PackedModel
from shardwright.worker.per_request import RecomputingModel
from shardwright.worker.rungs import batched_rungs, single_rungs
from shardwright.worker.self_check import check_logits, check_sample, compare_logits, plain_logits, treats_alike
from shardwright.worker.state_slots import StateSlotModel
from shardwright.worker.step import StepModel

logger = logging.getLogger(__name__)

T = TypeVar("T")


def climb(
    module: nn.Module,
    *,
    num_positions: int,
    vocab_size: int,
    block_size: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
    attention_backend: str = "auto",
    parallel: ParallelConfig | None = None,
    self_check: bool = True,
    loops: ExpertLoops | None = None,
    agree: Callable[[bool], bool] = bool,
) -> StepModel:
    """The model on the highest rung that is right for it, its cache not allocated yet.

    Ranks that share a model stand on the same rung: the highest that is right for all of them.

    Args:
        module: weights loaded, on the device.
        num_positions: longest sequence that will be served.
        vocab_size: number of token ids to draw the check's tokens from.
        block_size: tokens per block.
        dtype: of weights, keys and values.
        compute_dtype: of attention's products.
        device: of the module.
        attention_backend: what computes attention, as `choose_backend` has it.
        parallel: how many ranks share the model; None: this one has it alone.
        self_check: whether a rung has to give the module's own logits; if not, it is enough that it can be built.
        loops: over experts in the module, which run all at once from here on where that is the same; None: it has none.
        agree: whether all ranks that share the model say yes; each asks after the same forward passes.

    Raises: UnsupportedModelError if the module's own forward pass fails; EngineError if only that of another rank does.
    """
    fresh = Remembered(module)
    set_attention(module, "eager")
    loops = ExpertLoops(module) if loops is None else loops
    expected = None
    if self_check or not agree(not loops):
        with loops.watching():
            expected = _expected(module, vocab_size=vocab_size, agree=agree)
        _group_experts(loops, module, expected, vocab_size=vocab_size, dtype=dtype, agree=agree)
    reasons: dict[str, None] = {}  # an ordered set: a rung that is tried twice may fail for the same reason
    rungs = single_rungs(module, device=device, parallel=parallel)
    unpacked = _why_not_packed(module, loops, num_positions=num_positions, agree=agree)
    if unpacked is None:
        rungs[:0] = batched_rungs(
            module,
            make_backend(
                choose_backend(attention_backend, device=device, dtype=dtype),
                block_size=block_size,
                device=device,
                compute_dtype=compute_dtype,
            ),
            num_positions=num_positions,
            vocab_size=vocab_size,
            dtype=dtype,
            device=device,
            parallel=parallel,
            agree=agree,
            fresh=fresh,
        )
    else:
        reasons[f"not packed: {unpacked}"] = None

    sizes: dict[str, Any] = {"vocab_size": vocab_size, "block_size": block_size, "dtype": dtype}
    check_far = partial(check_batches, num_positions=num_positions, **sizes)

    def check(model: StepModel, expected: Tensor) -> None:
        check_logits(model, expected, **sizes)
        if isinstance(model, PackedModel) and isinstance(model.served, InterceptedModel):
            check_sample(model, model.served.sample, block_size=block_size, dtype=dtype)
            is_alone = parallel is None or parallel.num_ranks == 1
            _settle_special_ids(model, lambda ids: agree(treats_alike(model, module, ids, **sizes)), is_alone=is_alone)

    def tried(name: AttentionRung, build: Callable[[], StepModel]) -> tuple[StepModel | None, str | None]:
        """A model, and why it cannot stand on its rung; all ranks are told the same of whether it can."""
        fresh.restore()
        set_attention(module, "eager")
        model, problem = _tried(build)
        stands = agree(problem is None)
        is_plain = name is AttentionRung.RECOMPUTE  # the module's own forward pass
        if stands and model is not None and self_check and expected is not None and not is_plain:
            _, problem = _tried(partial(check, model, expected))
            stands = agree(problem is None)
            if stands and isinstance(model, (PackedModel, StateSlotModel)) and model.batches_own:
                _, problem = _tried(partial(check_far, model))
                stands = agree(problem is None)
        return model, None if stands else problem or "another rank cannot stand there"

    for rung in rungs:
        build = partial(rung.build, "; ".join(reasons))
        model, problem = tried(rung.name, build)
        if problem is not None and not agree(model is None or not any(s.values_in_keys for s in model.layers)):
            as_latents = problem
            model, problem = tried(rung.name, partial(build, expanded_because=f"as latents, {as_latents}"))
            if problem is None:
                logger.warning("keys and values are cached, not the latents they are made of: %s", as_latents)
        if problem is None and model is not None:
            if not self_check:
                logger.warning(
                    "rung %r was not checked: that the model's tokens are right was not verified", str(rung.name)
                )
            return _settled(model)
        reasons[f"not {rung.name}: {problem}"] = None
    raise UnsupportedModelError("; ".join(reasons))


def _settle_special_ids(model: PackedModel, are_alike: Callable[[list[int]], bool], *, is_alone: bool) -> None:
    """Keep the token ids apart that have to be. Raises UnsupportedModelError if there are any and many ranks."""
    ids, model.special_ids = model.special_ids, []
    if not ids or are_alike(ids):
        return
    if not is_alone:
        raise UnsupportedModelError(f"its code treats token ids {ids} in a way of its own")
    logger.warning(
        "requests with token ids %s are computed whole: the model's code treats these in a way of its own", ids
    )
    model.special_ids = ids


def _why_not_packed(
    module: nn.Module, loops: ExpertLoops, *, num_positions: int, agree: Callable[[bool], bool]
) -> str | None:
    """Why requests cannot be computed together, if they would change each other."""
    if not agree(not far_position_turns_others(module, num_positions=num_positions)):
        return "its rotary embedding depends on the longest request, unless --max-model-len is the original length"
    if not agree(not loops.crowded):
        return f"what the experts of {', '.join(loops.crowded)} give a token depends on how many others there are"
    return None


def _group_experts(
    loops: ExpertLoops,
    module: nn.Module,
    expected: Tensor,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    agree: Callable[[bool], bool],
) -> None:
    """Let experts run all at once where that gives the module's own logits."""
    loops.group(agree)
    if agree(not loops.grouped):
        return

    def look() -> float:
        return compare_logits(expected, plain_logits(module, vocab_size=vocab_size), dtype=dtype)

    _, problem = _tried(look)
    if not agree(problem is None):
        loops.undo(problem or "all at once, they give other logits on another rank")


def _settled(model: StepModel) -> StepModel:
    """A model that stays on its rung."""
    if isinstance(model, PackedModel):
        model.is_chosen = True
    if isinstance(model, RecomputingModel):
        logger.warning("attention is served on rung %r, one request at a time: %s", str(model.rung), model.rung_reason)
    return model


def _tried(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """What an action gives, or why it gives nothing."""
    try:
        return action(), None
    except ShardwrightError as exc:
        return None, str(exc)
    except Exception as exc:  # the model's code may fail in any way on a path that its author never took
        return None, described(exc)


def _expected(module: nn.Module, *, vocab_size: int, agree: Callable[[bool], bool]) -> Tensor:
    """Logits of the module's own forward pass. Raises as `climb` does."""
    failure: Exception | None = None
    expected = torch.empty(0)
    try:
        expected = plain_logits(module, vocab_size=vocab_size)
    except Exception as exc:
        failure = exc
    if not agree(failure is None):
        raise failure or EngineError("the model's forward pass fails on another rank")
    return expected
