"""From a configuration to a rank that can run steps: load, adapt, check, measure, allocate."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from torch import nn

from shardwright.adapt.eager import eager
from shardwright.cache.spec import CacheGroup
from shardwright.config import EngineConfig, SchedulerConfig
from shardwright.engine.messages import EngineInfo
from shardwright.errors import ConfigError, UnsupportedModelError
from shardwright.layers.upcast_linear import has_fast_half_products, upcast_linears
from shardwright.loading.load import weight_bytes
from shardwright.worker.batch import Batch, StepResult
from shardwright.worker.blueprint import Blueprint
from shardwright.worker.ladder import climb
from shardwright.worker.memory import kv_cache_budget, plan_cache
from shardwright.worker.model_runner import ModelRunner, RunnerLimits
from shardwright.worker.self_check import run_largest_step
from shardwright.worker.step import StepModel
from shardwright.worker.threads import one_thread

logger = logging.getLogger(__name__)

DEFAULT_BATCHED_TOKENS = 2048
"""Token budget of a step unless told otherwise: keeps matrix products busy, and streams beside it smooth."""


class Worker:
    """One rank of one engine.

    Args:
        config: of the engine.

    Raises: a UsageError for models, weights and options that do not work, before anything is served.
    """

    @eager
    def __init__(self, config: EngineConfig) -> None:
        started = time.perf_counter()
        device = resolve_device(config.model.device)
        blueprint = Blueprint.of(config.model)
        module = blueprint.load(dummy=config.model.load_format == "dummy").to(device)
        loaded = time.perf_counter()
        model = adapt(module, blueprint, config, device)
        sizes = StepSizes.of(model, config.scheduler, blueprint.max_model_len)
        block_size = config.cache.block_size
        if device.type == "cuda":  # its peak memory is read off afterwards
            run_largest_step(
                model,
                num_tokens=sizes.max_num_batched_tokens,
                max_model_len=blueprint.max_model_len,
                block_size=block_size,
            )
        state_bytes = model.bytes_per_row * sizes.max_num_seqs
        bytes_per_block = model.bytes_per_block(block_size)
        plan = plan_cache(
            kv_cache_budget(config.cache, device) - state_bytes,
            model.groups,
            bytes_per_block=bytes_per_block,
            block_size=block_size,
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_model_len=blueprint.max_model_len,
            may_shorten=config.model.max_model_len is None,
        )
        model.allocate(num_rows=sizes.max_num_seqs, num_blocks=plan.num_blocks, block_size=block_size)
        limits = RunnerLimits(
            max_num_seqs=sizes.max_num_seqs,
            max_model_len=plan.max_model_len,
            vocab_size=blueprint.vocab_size,
            block_size=block_size,
        )
        self._runner = ModelRunner(model, limits, device=device, seed=config.model.seed)
        self.groups: list[CacheGroup] = model.groups
        self.info = EngineInfo(
            model=config.model.model,
            path=str(blueprint.path or ""),
            model_type=blueprint.config.model_type,
            architecture=type(module).__name__,
            dtype=str(blueprint.dtype).removeprefix("torch."),
            device=str(device),
            num_parameters=sum(p.numel() for p in module.parameters()),
            weight_bytes=weight_bytes(module),
            vocab_size=blueprint.vocab_size,
            max_model_len=plan.max_model_len,
            block_size=block_size,
            num_blocks=plan.num_blocks,
            kv_cache_bytes=(plan.num_blocks + 1) * bytes_per_block + state_bytes,
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            attention_rung=model.rung,
            attention_reason=model.rung_reason,
            takes_chunks=model.takes_chunks,
            reuses_prefixes=model.reuses_prefixes,
            eos_token_ids=blueprint.eos_token_ids,
        )
        log_start(self.info, load_s=loaded - started, ready_s=time.perf_counter() - started)

    @eager
    def execute(self, batch: Batch) -> StepResult | None:
        """Run one step; None from ranks that do not sample."""
        return self._runner.execute(batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """How much may run in one step."""

    max_num_seqs: int
    max_num_batched_tokens: int

    @classmethod
    def of(cls, model: StepModel, config: SchedulerConfig, max_model_len: int) -> StepSizes:
        """As the options say, within what the model takes. Raises ConfigError if a prompt could never run."""
        num_seqs, num_tokens = config.max_num_seqs, resolve_batched_tokens(config, max_model_len)
        if model.max_step_tokens is not None:
            num_seqs, num_tokens = min(num_seqs, model.max_step_tokens), min(num_tokens, model.max_step_tokens)
        if not model.takes_chunks:
            num_tokens = max(num_tokens, max_model_len)
        return cls(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)


def adapt(module: nn.Module, blueprint: Blueprint, config: EngineConfig, device: torch.device) -> StepModel:
    """The model on its rung, with layers replaced where that is faster. Raises UnsupportedModelError."""
    compute_dtype = blueprint.dtype
    if device.type == "cpu" and blueprint.dtype is not torch.float32 and not has_fast_half_products():
        upcast_linears(module)
        compute_dtype = torch.float32
    try:
        with one_thread():
            return climb(
                module,
                num_positions=blueprint.max_model_len,
                vocab_size=blueprint.vocab_size,
                block_size=config.cache.block_size,
                dtype=blueprint.dtype,
                compute_dtype=compute_dtype,
                device=device,
            )
    except UnsupportedModelError as exc:
        name = f"{config.model.model} ({blueprint.config.model_type})"
        raise UnsupportedModelError(f"{name} cannot be served: {exc}") from exc


def resolve_device(device: str) -> torch.device:
    """The device that "auto" means here. Raises ConfigError if the one asked for is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda but torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    return torch.device(device)


def resolve_batched_tokens(config: SchedulerConfig, max_model_len: int) -> int:
    """Token budget of a step. Raises ConfigError if a prompt could never run."""
    if config.enable_chunked_prefill:
        return config.max_num_batched_tokens or max(DEFAULT_BATCHED_TOKENS, config.max_num_seqs)
    budget = config.max_num_batched_tokens or max(max_model_len, config.max_num_seqs)
    if budget < max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens is {budget:,}, less than max_model_len, which is {max_model_len:,}: "
            "without chunked prefill a longer prompt could never run"
        )
    return budget


def log_start(info: EngineInfo, *, load_s: float, ready_s: float) -> None:
    """Tell once what is served and how."""
    logger.info(
        "%s: %s, %.1f M parameters in %s on %s, attention %s; weights %.2f GiB, KV cache %.2f GiB for %s tokens; "
        "loaded in %.1f s, ready in %.1f s",
        info.model,
        info.architecture,
        info.num_parameters / 1e6,
        info.dtype,
        info.device,
        info.attention_rung,
        info.weight_bytes / 2**30,
        info.kv_cache_bytes / 2**30,
        f"{info.num_blocks * info.block_size:,}",
        load_s,
        ready_s,
    )
