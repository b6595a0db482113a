"""The numerical proof of a plan: the ranks of a sharded model in one process, beside the model as it is written."""

from shardwright.plans.prove.threads import MemoryLink, ThreadCollectives, run_ranks

__all__ = ["MemoryLink", "ThreadCollectives", "run_ranks"]
