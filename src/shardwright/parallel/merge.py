"""What the ranks found out, put together: one engine's limits, and the allocation that all of them can make."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from shardwright.config import EngineConfig
from shardwright.engine.messages import EngineInfo
from shardwright.errors import ConfigError
from shardwright.worker.memory import plan_cache
from shardwright.worker.report import Allocation, WorkerReport, merged_groups
from shardwright.worker.worker import StepSizes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """One engine."""

    info: EngineInfo
    allocation: Allocation


def merge(config: EngineConfig, reports: Sequence[WorkerReport]) -> Merged:
    """Put the reports of all ranks together.

    Args:
        config: of the engine.
        reports: by rank.

    Raises: ConfigError if the ranks have read different models, or a rank's memory is too small for one sequence.
    """
    check_same_model(reports)
    facts = reports[0].facts
    tp = config.parallel.tensor_parallel_size
    stages = reports[::tp]
    groups = merged_groups([r.groups for r in stages], [r.num_layers for r in stages])
    sizes = StepSizes.of(reports, config.scheduler, facts.max_model_len)
    plans = [
        plan_cache(
            report.budget_bytes - report.bytes_per_row * sizes.max_num_seqs,
            groups,
            bytes_per_block=report.bytes_per_block,
            block_size=config.cache.block_size,
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_model_len=facts.max_model_len,
            may_shorten=config.model.max_model_len is None,
        )
        for report in reports
    ]
    num_blocks = min(plan.num_blocks for plan in plans)
    max_model_len = min(plan.max_model_len for plan in plans)
    devices = dict.fromkeys(report.device for report in reports)
    info = EngineInfo(
        model=config.model.model,
        path=facts.path,
        model_type=facts.model_type,
        architecture=facts.architecture,
        dtype=facts.dtype,
        device=", ".join(devices),
        num_parameters=facts.num_parameters,
        weight_bytes=sum(report.weight_bytes for report in reports),
        rank_weight_bytes=[report.weight_bytes for report in reports],
        vocab_size=facts.vocab_size,
        max_model_len=max_model_len,
        block_size=config.cache.block_size,
        num_blocks=num_blocks,
        kv_cache_bytes=sum(
            (num_blocks + 1) * report.bytes_per_block + report.bytes_per_row * sizes.max_num_seqs for report in reports
        ),
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        attention_rung=", ".join(dict.fromkeys(report.attention_rung for report in reports)),
        attention_reason=stages[-1].attention_reason,
        attention_backend=", ".join(
            dict.fromkeys(report.attention_backend for report in reports if report.attention_backend)
        ),
        takes_chunks=all(report.takes_chunks for report in reports),
        reuses_prefixes=all(report.reuses_prefixes for report in reports),
        can_rewind=all(report.can_rewind for report in reports),
        eos_token_ids=facts.eos_token_ids,
    )
    allocation = Allocation(
        groups=groups,
        num_blocks=num_blocks,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=max_model_len,
    )
    return Merged(info=info, allocation=allocation)


def check_same_model(reports: Sequence[WorkerReport]) -> None:
    """Raise ConfigError if a rank has read another model than the first."""
    first = reports[0]
    for rank, report in enumerate(reports):
        if report.facts.fingerprint != first.facts.fingerprint:
            raise ConfigError(
                f"rank {rank} on {report.host} has other files in {report.facts.path} than rank 0 on {first.host}: "
                "copy the same model to every machine"
            )
        if report.facts != first.facts:
            raise ConfigError(
                f"rank {rank} on {report.host} has found another model than rank 0 on {first.host}: "
                f"{report.facts} and {first.facts}"
            )


def log_start(info: EngineInfo, config: EngineConfig, *, load_s: float, ready_s: float) -> None:
    """Tell once what is served and how."""
    logger.info(
        "%s: %s, %.1f M parameters in %s on %s%s, attention %s%s; weights %s, KV cache %.2f GiB for %s tokens; "
        "loaded in %.1f s, ready in %.1f s",
        info.model,
        info.architecture,
        info.num_parameters / 1e6,
        info.dtype,
        info.device,
        _ranks(config),
        info.attention_rung,
        f" by {info.attention_backend} kernels" if info.attention_backend else "",
        " + ".join(f"{size / 2**30:.2f}" for size in info.rank_weight_bytes) + " GiB",
        info.kv_cache_bytes / 2**30,
        f"{info.num_blocks * info.block_size:,}",
        load_s,
        ready_s,
    )


def _ranks(config: EngineConfig) -> str:
    parallel = config.parallel
    if parallel.num_ranks == 1:
        return ""
    return f" in {parallel.num_ranks} ranks (tp {parallel.tensor_parallel_size}, pp {parallel.pipeline_parallel_size})"
