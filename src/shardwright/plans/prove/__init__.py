"""The numerical proof of a plan: the ranks of a sharded model in one process, beside the model as it is written."""

from shardwright.plans.prove.prove import prove_plan
from shardwright.plans.prove.report import Divergence, ProofReport
from shardwright.plans.threads import MemoryLink, ThreadCollectives, run_ranks

__all__ = ["Divergence", "MemoryLink", "ProofReport", "ThreadCollectives", "prove_plan", "run_ranks"]
