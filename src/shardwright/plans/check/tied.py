"""Parameters that modules share: one tensor, cut in one way, on every stage that uses it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from shardwright.plans.check.findings import Finding, Severity
from shardwright.plans.check.subject import Subject, Weight, line
from shardwright.plans.quantities import size
from shardwright.plans.resolve import cut_dimension, matching_pattern
from shardwright.plans.styles import COLUMN_GATHERED, VOCABULARY
from shardwright.plans.table import ShardTable


def check_tied_cuts(subject: Subject) -> Iterator[Finding]:
    """Names of one parameter that the plan cuts differently."""
    for weight in subject.weights:
        said = {
            name: cut_dimension(
                subject.modules[name.rpartition(".")[0]],
                name.rpartition(".")[2],
                len(weight.shape),
                subject.plan.styles[pattern],
            )
            for name in (weight.name, *weight.aliases)
            if (pattern := matching_pattern(subject.plan, name)) is not None
        }
        if len(set(said.values())) > 1:
            yield _differently(subject, weight, list(said))


def _differently(subject: Subject, weight: Weight, names: list[str]) -> Finding:
    words = {name: matching_pattern(subject.plan, name) for name in names}
    told = ", ".join(f"{pattern} {subject.plan.tp[pattern]}" for pattern in words.values() if pattern is not None)
    first = next(pattern for pattern in words.values() if pattern is not None)
    fixes = [
        line(subject.general[name.rpartition(".")[0]], _word(subject.modules[name.rpartition(".")[0]]))
        for name in names
    ]
    return Finding(
        Severity.ERROR,
        first,
        f"{' and '.join(names)} are one tensor, which is cut differently: {told}",
        "\n".join(fixes),
        f"tp {first}",
    )


def _word(module: nn.Module) -> str:
    return (VOCABULARY if isinstance(module, nn.Embedding) else COLUMN_GATHERED).name


def check_tied_stages(table: ShardTable) -> Iterator[Finding]:
    """Shared parameters of which several stages hold a copy."""
    shared = [row for row in table.parameters if row.aliases and len(row.stages) > 1]
    if shared:
        first = shared[0]
        total = sum(row.local_bytes(0) * (len(row.stages) - 1) for row in shared)
        more = f", and {len(shared) - 1} more" if len(shared) > 1 else ""
        yield Finding(
            Severity.NOTE,
            first.name,
            f"is {first.aliases[0]} too{more}: stages {', '.join(str(stage + 1) for stage in first.stages)} each hold "
            f"it, {size(total)} more than once",
        )
