"""From a configuration to a rank that can run steps, in two phases: load, adapt, check and measure; then allocate what
all ranks have agreed on.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn

from shardwright.adapt.compiled import compile_layers
from shardwright.adapt.eager import eager
from shardwright.adapt.served_model import ServedModel
from shardwright.attention.choice import choose_backend
from shardwright.cache.spec import LayerSpec
from shardwright.config import EngineConfig, ModelConfig, SchedulerConfig
from shardwright.errors import ConfigError, UnsupportedModelError
from shardwright.experts.loops import ExpertLoops
from shardwright.foreign_errors import described
from shardwright.layers.cpu_linears import keep_unpacked, replace_linears
from shardwright.layers.few_launches import FewLaunches
from shardwright.layers.parallel import gather_logits_once
from shardwright.layers.upcast_linear import has_fast_half_products
from shardwright.loading.load import weight_bytes
from shardwright.worker.batch import Batch, StepResult
from shardwright.worker.blueprint import Blueprint
from shardwright.worker.draft import Draft, DraftModel
from shardwright.worker.fingerprint import fingerprint
from shardwright.worker.ladder import climb
from shardwright.worker.memory import kv_cache_budget
from shardwright.worker.model_runner import ModelRunner, RunnerLimits
from shardwright.worker.no_padding import expect_no_padding
from shardwright.worker.packed import PackedModel
from shardwright.worker.part import load_part
from shardwright.worker.placement import ALONE, Peers, Placement
from shardwright.worker.report import Allocation, ModelFacts, WorkerReport, local_groups, merged_groups
from shardwright.worker.self_check import compare_logits, run_largest_step, stepwise_logits
from shardwright.worker.step import StepModel, Tables
from shardwright.worker.threads import threads_that_come

logger = logging.getLogger(__name__)

DEFAULT_BATCHED_TOKENS = 2048
"""Token budget of a step unless told otherwise: keeps matrix products busy, and streams beside it smooth."""


class Worker:
    """One rank of one engine: loaded and measured when made, ready for steps once it has its allocation.

    Args:
        config: of the engine.
        placement: of this rank.
        peers: the other ranks; None for a rank alone.

    Raises: a UsageError for models, weights and options that do not work, before anything is served.
    """

    @eager
    def __init__(self, config: EngineConfig, placement: Placement = ALONE, peers: Peers | None = None) -> None:
        started = time.perf_counter()
        self._config = config
        self._placement = placement
        self._device = resolve_device(config.model.device, placement)
        blueprint = Blueprint.of(config.model)
        part = load_part(blueprint, config, placement, peers, self._device)
        module = part.module.to(self._device)
        loaded = time.perf_counter()
        self._model = model = adapt(module, blueprint, config, self._device, agree=part.agree)
        self._draft: Draft | None = None
        if config.speculative.method == "draft" and placement.samples and model.can_rewind:
            self._draft = load_draft(config, blueprint, self._device)
        cached: list[StepModel] = [model] if self._draft is None else [model, self._draft.model]
        if self._device.type == "cuda":  # its peak memory is read off afterwards
            sizes = StepSizes.of([model], config.scheduler, blueprint.max_model_len)
            run_largest_step(
                model,
                num_tokens=sizes.max_num_batched_tokens,
                max_model_len=blueprint.max_model_len,
                block_size=config.cache.block_size,
            )
        gather_logits_once(module)  # they were needed by every rank's check, and are by the one that samples
        self._vocab_size = blueprint.vocab_size
        self._runner: ModelRunner | None = None
        self.report = WorkerReport(
            facts=ModelFacts(
                path=str(blueprint.path or ""),
                fingerprint=fingerprint(blueprint.path, config.model.weights) if placement.num_ranks > 1 else "",
                model_type=blueprint.config.model_type,
                architecture=part.architecture,
                dtype=str(blueprint.dtype).removeprefix("torch."),
                num_parameters=part.num_parameters,
                vocab_size=blueprint.vocab_size,
                max_model_len=blueprint.max_model_len,
                eos_token_ids=blueprint.eos_token_ids,
            ),
            host=socket.gethostname(),
            device=str(self._device),
            weight_bytes=weight_bytes(module),
            num_layers=sum(len(one.layers) for one in cached),
            groups=merged_groups([one.groups for one in cached], [len(one.layers) for one in cached]),
            budget_bytes=kv_cache_budget(config.cache, self._device, num_sharing=placement.num_local),
            bytes_per_block=sum(one.bytes_per_block(config.cache.block_size) for one in cached),
            bytes_per_row=model.bytes_per_row,
            max_step_tokens=model.max_step_tokens,
            takes_chunks=model.takes_chunks,
            reuses_prefixes=model.reuses_prefixes,
            can_rewind=model.can_rewind,
            attention_rung=model.rung,
            attention_reason=model.rung_reason,
            attention_backend=attention_kernels(model.layers, config.model, self._device, blueprint.dtype),
            load_s=loaded - started,
            ready_s=time.perf_counter() - started,
        )

    def allocate(self, allocation: Allocation) -> None:
        """Make room for the cache and the tables of the running sequences."""
        block_size = self._config.cache.block_size
        self._model.allocate(num_rows=allocation.max_num_seqs, num_blocks=allocation.num_blocks, block_size=block_size)
        model = self._model
        if isinstance(model, PackedModel) and self._placement.num_ranks == 1 and not self._config.model.enforce_eager:
            self._capture(model, allocation)
        limits = RunnerLimits(
            max_num_seqs=allocation.max_num_seqs,
            max_model_len=allocation.max_model_len,
            vocab_size=self._vocab_size,
            block_size=block_size,
        )
        self._runner = ModelRunner(
            self._model,
            limits,
            device=self._device,
            seed=self._config.model.seed,
            groups=local_groups(allocation.groups, self._model.groups),
            samples=self._placement.samples,
            draft=None if self._draft is None else partial(self._allocate_draft, self._draft, allocation),
            has_kernels=self.report.attention_backend == "triton",
        )

    def _allocate_draft(self, draft: Draft, allocation: Allocation, token_rows: Tables) -> DraftModel:
        block_size = self._config.cache.block_size
        draft.model.allocate(num_rows=allocation.max_num_seqs, num_blocks=allocation.num_blocks, block_size=block_size)
        return DraftModel(
            draft,
            token_rows,
            num_blocks=allocation.num_blocks,
            block_size=block_size,
            most_tokens=allocation.max_num_batched_tokens,
            groups=local_groups(allocation.groups, draft.model.groups),
        )

    @eager
    @torch.inference_mode()
    def _capture(self, model: PackedModel, allocation: Allocation) -> None:
        """Let decode steps be replayed, on a device that can."""
        started = time.perf_counter()
        problem = model.capture(
            max_num_seqs=allocation.max_num_seqs, max_model_len=allocation.max_model_len, vocab_size=self._vocab_size
        )
        if self._device.type == "cuda":
            logger.info(
                "decode steps are captured in %.1f s%s",
                time.perf_counter() - started,
                f", but {problem}" if problem else "",
            )

    @eager
    def execute(self, batch: Batch) -> StepResult | None:
        """Run one step; None from ranks that do not sample."""
        assert self._runner is not None, "allocate comes first"
        return self._runner.execute(batch)


class StepLimited(Protocol):
    """What limits a step."""

    @property
    def max_step_tokens(self) -> int | None: ...
    @property
    def takes_chunks(self) -> bool: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """How much may run in one step."""

    max_num_seqs: int
    max_num_batched_tokens: int

    @classmethod
    def of(cls, models: Sequence[StepLimited], config: SchedulerConfig, max_model_len: int) -> StepSizes:
        """As the options say, within what every rank's model takes. Raises ConfigError if a prompt could never run."""
        num_seqs, num_tokens = config.max_num_seqs, resolve_batched_tokens(config, max_model_len)
        for limit in (model.max_step_tokens for model in models if model.max_step_tokens is not None):
            num_seqs, num_tokens = min(num_seqs, limit), min(num_tokens, limit)
        if not all(model.takes_chunks for model in models):
            num_tokens = max(num_tokens, max_model_len)
        return cls(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)


def adapt(
    module: nn.Module,
    blueprint: Blueprint,
    config: EngineConfig,
    device: torch.device,
    *,
    agree: Callable[[bool], bool] = bool,
) -> StepModel:
    """The model on its rung, with layers replaced where that is faster. Raises UnsupportedModelError."""
    compute_dtype = blueprint.dtype
    expect_no_padding(module)
    if device.type == "cpu":
        replace_linears(module)
        compute_dtype = torch.float32 if not has_fast_half_products() else blueprint.dtype
    loops = ExpertLoops(module)
    try:
        with threads_that_come():
            model = climb(
                module,
                num_positions=blueprint.max_model_len,
                vocab_size=blueprint.vocab_size,
                block_size=config.cache.block_size,
                dtype=blueprint.dtype,
                compute_dtype=compute_dtype,
                device=device,
                attention_backend=config.model.attention_backend,
                parallel=config.parallel,
                self_check=config.model.self_check,
                loops=loops,
                agree=agree,
            )
            loops.log()
            if config.model.compile_layers:
                _compile(model, blueprint, config)
            elif isinstance(model, PackedModel) and model.runs_on_triton and config.parallel.num_ranks == 1:
                _launch_less(model, blueprint, config, without=loops.grouped)
            if config.cache.kv_cache_dtype == "fp8":
                _store_in_8_bits(model, blueprint, config)
            if config.parallel.num_ranks * config.parallel.data_parallel_size == 1:  # several have one memory
                keep_unpacked(module)
            if isinstance(model, PackedModel) and config.parallel.num_ranks == 1 and not config.model.enforce_eager:
                _record(model, blueprint, config)
            return model
    except UnsupportedModelError as exc:
        name = f"{config.model.model} ({blueprint.config.model_type})"
        raise UnsupportedModelError(f"{name} cannot be served: {exc}") from exc


def load_draft(config: EngineConfig, target: Blueprint, device: torch.device) -> Draft:
    """The model that proposes tokens for another one, without a cache.

    Raises: as a Worker does; ConfigError if it has another vocabulary, or cannot propose.
    """
    config = config.of_draft
    blueprint = Blueprint.of(config.model)
    if blueprint.vocab_size != target.vocab_size:
        raise ConfigError(
            f"speculative_model {config.model.model} has a vocabulary of {blueprint.vocab_size:,} tokens but the model "
            f"has one of {target.vocab_size:,}: a model that drafts must have the same"
        )
    blueprint = replace(blueprint, max_model_len=min(blueprint.max_model_len, target.max_model_len))
    part = load_part(blueprint, config, ALONE, None, device)
    model = adapt(part.module.to(device), blueprint, config, device)
    if not model.can_rewind:
        raise ConfigError(
            f"speculative_model {config.model.model} is served on rung {model.rung}: what its wrong proposals leave "
            f"behind cannot be taken back ({model.rung_reason})"
        )
    logger.info("tokens are proposed by %s, attention %s", config.model.model, model.rung)
    return Draft(model=model, max_model_len=blueprint.max_model_len)


def _compile(model: StepModel, blueprint: Blueprint, config: EngineConfig) -> None:
    """Let a model's layers be compiled, if they give what they gave before."""
    if not isinstance(model, PackedModel) or not isinstance(model.served, ServedModel):
        logger.warning("layers are not compiled: the model's attention does not go through Transformers' interface")
        return
    module = model.served.module
    problem = _exchange(model, lambda: compile_layers(module), blueprint, config)
    if problem is not None:
        logger.warning("layers are not compiled: %s", problem)


def _launch_less(model: PackedModel, blueprint: Blueprint, config: EngineConfig, *, without: Sequence[str]) -> None:
    """Let kernels of ours compute what they can of a model but for some modules, if it gives what it gave before."""
    found = FewLaunches(model.served.module, without)
    problem = _exchange(model, found.apply, blueprint, config)
    if problem is None:
        logger.info("kernels of our own compute %d norms and %d gated activations", len(found.norms), len(found.gated))
    else:
        logger.warning("norms and activations run the model's own code: %s", problem)


def _exchange(
    model: PackedModel, exchange: Callable[[], Callable[[], None]], blueprint: Blueprint, config: EngineConfig
) -> str | None:
    """Exchange parts of a model's code, if it gives what it gave before.

    Args:
        model: on its rung.
        exchange: does so, and returns what undoes it.
        blueprint, config: of the model.

    Returns: why it was undone; None if it was not.
    """
    sizes = {"vocab_size": blueprint.vocab_size, "block_size": config.cache.block_size}
    expected = stepwise_logits(model, **sizes)
    undo = exchange()
    model.is_chosen = False  # what fails now is the exchange, and no reason to do without the cache
    try:
        compare_logits(expected, stepwise_logits(model, **sizes), dtype=blueprint.dtype)
    except Exception as exc:  # of a compiler, or of code that it does not take
        undo()
        return str(exc) if isinstance(exc, UnsupportedModelError) else described(exc)
    finally:
        model.is_chosen = True
    return None


def _store_in_8_bits(model: StepModel, blueprint: Blueprint, config: EngineConfig) -> None:
    """Let a model's cache be of 8-bit numbers, and say what that does to its logits. Raises ConfigError."""
    if not isinstance(model, PackedModel):
        raise ConfigError(
            f"kv_cache_dtype is fp8 but the model is served on rung {model.rung}, and keeps its own cache"
        )
    if config.parallel.num_ranks > 1:
        raise ConfigError("kv_cache_dtype is fp8 but that is for one rank alone: nobody has tried it with several")
    sizes = {"vocab_size": blueprint.vocab_size, "block_size": config.cache.block_size}
    expected = stepwise_logits(model, **sizes)
    model.store_in_8_bits()
    difference = (stepwise_logits(model, **sizes) - expected).square().mean().sqrt() / expected.std()
    logger.info("keys and values are kept in 8 bits: logits differ by %.2g of their spread", float(difference))


def _record(model: PackedModel, blueprint: Blueprint, config: EngineConfig) -> None:
    """Let a model's steps be carried out natively, if they can be."""
    sizes = StepSizes.of([model], config.scheduler, blueprint.max_model_len)
    num_guesses = 0 if config.speculative.method == "none" else config.speculative.step_tokens("cpu")
    problem = model.record(
        num_positions=blueprint.max_model_len,
        vocab_size=blueprint.vocab_size,
        most_tokens=sizes.max_num_batched_tokens,
        most_rows=sizes.max_num_seqs + num_guesses,
    )
    if problem is None and model.program is not None:
        model.program.compile_runs()
        logger.debug("steps are recorded, and carried out natively")
    else:
        logger.info("steps run the model's own code: %s", problem)


def attention_kernels(
    layers: Sequence[LayerSpec], config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> str:
    """The back end that computes a model's attention; empty if none of it is ours. Raises ConfigError."""
    if all(layer.is_own for layer in layers):
        return ""
    return choose_backend(config.attention_backend, device=device, dtype=dtype)


def resolve_device(device: str, placement: Placement = ALONE) -> torch.device:
    """The device that "auto" means here, of one rank. Raises ConfigError if the one asked for is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda but torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    if device == "cuda" and placement.num_ranks > 1:
        if placement.gpu >= torch.cuda.device_count():
            raise ConfigError(
                f"every rank needs a GPU of its own but {socket.gethostname()} has {torch.cuda.device_count()} for "
                f"{placement.num_local}: use fewer ranks, or --device cpu"
            )
        torch.cuda.set_device(placement.gpu)
        return torch.device("cuda", placement.gpu)
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
