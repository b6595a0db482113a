"""How many KV blocks fit: measured on the device once the model is loaded and has run its largest step."""

from __future__ import annotations

import logging
from bisect import bisect_right
from dataclasses import dataclass

import psutil
import torch

from shardwright.cache.spec import CacheGroup, blocks_for_sequence
from shardwright.config import CacheConfig
from shardwright.errors import ConfigError

logger = logging.getLogger(__name__)

CPU_DEFAULT_BYTES = 4 << 30
"""Most memory that the KV cache takes on a CPU unless told otherwise: the machine is not ours alone."""

CPU_SHARE = 0.5
"""Share of the memory available on a CPU that the KV cache takes at most unless told otherwise."""


def kv_cache_budget(config: CacheConfig, device: torch.device, *, num_sharing: int = 1) -> int:
    """Bytes that the KV cache of one rank may take. Call it after the model ran a step of the largest size.

    On a GPU: `gpu_memory_utilization` of its memory, less what weights and that step took at their peak. On a CPU: the
    machine's available memory decides, which `num_sharing` ranks share.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        free, _ = torch.cuda.mem_get_info(device)
        used_by_others = total - free - torch.cuda.memory_reserved(device)
        return int(total * config.gpu_memory_utilization) - torch.cuda.max_memory_allocated(device) - used_by_others
    return min(CPU_DEFAULT_BYTES, int(psutil.virtual_memory().available * CPU_SHARE)) // num_sharing


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """What the budget buys."""

    num_blocks: int
    """Of the pool; the null block comes on top."""
    max_model_len: int
    """As asked for, or less where nobody asked and no more fits."""


def plan_cache(
    budget: int,
    groups: list[CacheGroup],
    *,
    bytes_per_block: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    may_shorten: bool,
) -> CachePlan:
    """As many blocks as the budget holds, no more than all sequences at full length could use.

    Args:
        budget: bytes, from `kv_cache_budget`.
        groups: cache groups of the model.
        bytes_per_block, block_size: of the pool.
        max_num_seqs, max_num_batched_tokens: of the scheduler.
        max_model_len: longest sequence; one of them must fit.
        may_shorten: nobody asked for this `max_model_len`, so it may become less.

    Raises: ConfigError if no sequence of `max_model_len` fits.
    """

    def blocks_for(num_tokens: int) -> int:
        return blocks_for_sequence(groups, num_tokens=num_tokens, chunk=max_num_batched_tokens, block_size=block_size)

    affordable = budget // bytes_per_block - 1  # one more is allocated than handed out: the null block
    if affordable < blocks_for(max_model_len):
        fitting = bisect_right(range(max_model_len + 1), affordable, key=blocks_for) - 1
        if not may_shorten or fitting < 2 * block_size:
            needed = (blocks_for(max_model_len) + 1) * bytes_per_block
            raise ConfigError(
                f"the KV cache may take {budget / 2**20:,.0f} MiB but one sequence of max_model_len {max_model_len:,} "
                f"needs {needed / 2**20:,.0f} MiB: raise --kv-cache-memory-bytes, or lower --max-model-len"
            )
        logger.warning(
            "max_model_len is %s instead of the model's %s: no more fits in a KV cache of %.2f GiB; "
            "raise it with --kv-cache-memory-bytes",
            f"{fitting:,}",
            f"{max_model_len:,}",
            budget / 2**30,
        )
        max_model_len = fitting
    return CachePlan(num_blocks=min(affordable, blocks_for(max_model_len) * max_num_seqs), max_model_len=max_model_len)
