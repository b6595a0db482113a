"""From a configuration to a rank that can run steps: build, load, adapt, check, measure, allocate."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from shardwright.cache.spec import CacheGroup
from shardwright.config import EngineConfig, SchedulerConfig
from shardwright.engine.messages import EngineInfo
from shardwright.errors import ConfigError, UnsupportedModelError
from shardwright.layers.upcast_linear import has_fast_half_products, upcast_linears
from shardwright.loading.load import load_dummy_weights, load_weights, weight_bytes
from shardwright.models.build import build_module, load_config, max_positions, resolve_dtype
from shardwright.models.resolve import resolve_model
from shardwright.worker.batch import Batch, StepResult
from shardwright.worker.ladder import climb
from shardwright.worker.memory import kv_cache_budget, plan_cache
from shardwright.worker.model_runner import ModelRunner, RunnerLimits
from shardwright.worker.self_check import run_largest_step

logger = logging.getLogger(__name__)

DEFAULT_MODEL_LEN = 4096
"""Longest sequence for models whose config names no limit."""

DEFAULT_BATCHED_TOKENS = 2048
"""Token budget of a step unless told otherwise: keeps matrix products busy, and streams beside it smooth."""


class Worker:
    """One rank of one engine.

    Args:
        config: of the engine.

    Raises: a UsageError for models, weights and options that do not work, before anything is served.
    """

    def __init__(self, config: EngineConfig) -> None:
        started = time.perf_counter()
        self.device = resolve_device(config.model.device)
        path = resolve_model(config.model.model, revision=config.model.revision)
        model_config = load_config(path, trust_remote_code=config.model.trust_remote_code)
        dtype = resolve_dtype(config.model.dtype, model_config, path)
        max_model_len = resolve_max_model_len(config.model.max_model_len, model_config)
        max_num_batched_tokens = resolve_batched_tokens(config.scheduler, max_model_len)
        module = _load(path, model_config, dtype, config)
        loaded = time.perf_counter()
        torch.nn.Module.to(module, self.device)
        compute_dtype = dtype
        if self.device.type == "cpu" and dtype is not torch.float32 and not has_fast_half_products():
            upcast_linears(module)
            compute_dtype = torch.float32
        block_size = config.cache.block_size
        vocab_size = int(model_config.get_text_config().vocab_size)
        try:
            model = climb(
                module,
                num_positions=max_model_len,
                vocab_size=vocab_size,
                block_size=block_size,
                dtype=dtype,
                compute_dtype=compute_dtype,
                device=self.device,
            )
        except UnsupportedModelError as exc:
            raise UnsupportedModelError(
                f"{config.model.model} ({model_config.model_type}) cannot be served: {exc}"
            ) from exc
        self.groups: list[CacheGroup] = model.groups
        max_num_seqs = config.scheduler.max_num_seqs
        if model.max_step_tokens is not None:
            max_num_batched_tokens = min(max_num_batched_tokens, model.max_step_tokens)
            max_num_seqs = min(max_num_seqs, model.max_step_tokens)
        if not model.takes_chunks:
            max_num_batched_tokens = max(max_num_batched_tokens, max_model_len)
        if self.device.type == "cuda":
            run_largest_step(
                model, num_tokens=max_num_batched_tokens, max_model_len=max_model_len, block_size=block_size
            )
        bytes_per_block = model.bytes_per_block(block_size)
        plan = plan_cache(
            kv_cache_budget(config.cache, self.device) - model.bytes_per_row * max_num_seqs,
            model.groups,
            bytes_per_block=bytes_per_block,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            may_shorten=config.model.max_model_len is None,
        )
        max_model_len = plan.max_model_len
        model.allocate(num_rows=max_num_seqs, num_blocks=plan.num_blocks, block_size=block_size)
        self._runner = ModelRunner(
            model,
            RunnerLimits(
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                vocab_size=vocab_size,
                block_size=block_size,
            ),
            device=self.device,
            seed=config.model.seed,
        )
        self.info = EngineInfo(
            model=config.model.model,
            path=str(path),
            model_type=model_config.model_type,
            architecture=type(module).__name__,
            dtype=str(dtype).removeprefix("torch."),
            device=str(self.device),
            num_parameters=sum(p.numel() for p in module.parameters()),
            weight_bytes=weight_bytes(module),
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=plan.num_blocks,
            kv_cache_bytes=(plan.num_blocks + 1) * bytes_per_block + model.bytes_per_row * max_num_seqs,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            attention_rung=model.rung,
            attention_reason=model.rung_reason,
            takes_chunks=model.takes_chunks,
            reuses_prefixes=model.reuses_prefixes,
        )
        logger.info(
            "%s: %s, %.1f M parameters in %s on %s, %.2f GiB of weights, KV cache of %.2f GiB for %s tokens; "
            "loaded in %.1f s, ready in %.1f s",
            config.model.model,
            self.info.architecture,
            self.info.num_parameters / 1e6,
            self.info.dtype,
            self.info.device,
            self.info.weight_bytes / 2**30,
            self.info.kv_cache_bytes / 2**30,
            f"{plan.num_blocks * block_size:,}",
            loaded - started,
            time.perf_counter() - started,
        )

    def execute(self, batch: Batch) -> StepResult:
        """Run one step."""
        return self._runner.execute(batch)


def resolve_device(device: str) -> torch.device:
    """The device that "auto" means here. Raises ConfigError if the one asked for is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda but torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    return torch.device(device)


def resolve_max_model_len(asked: int | None, model_config: PretrainedConfig) -> int:
    """Most tokens of a sequence. Raises ConfigError if more is asked for than the model has positions."""
    limit = max_positions(model_config)
    if asked is None:
        return limit or DEFAULT_MODEL_LEN
    if limit is not None and asked > limit:
        raise ConfigError(f"max_model_len is {asked:,} but the model's config allows {limit:,} positions: lower it")
    return asked


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


def _load(path: Path, model_config: PretrainedConfig, dtype: torch.dtype, config: EngineConfig) -> PreTrainedModel:
    module = build_module(model_config, dtype, trust_remote_code=config.model.trust_remote_code)
    if config.model.load_format == "dummy":
        load_dummy_weights(module)
    else:
        load_weights(module, path, dtype, is_part=type(module.config) is not type(model_config))
    return module.requires_grad_(False)
