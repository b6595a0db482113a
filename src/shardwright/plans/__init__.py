"""Parallel plans as values: read, resolved, inferred, checked and proved. Knows no engine."""

from shardwright.plans.plan import ParallelPlan

__all__ = ["ParallelPlan"]
