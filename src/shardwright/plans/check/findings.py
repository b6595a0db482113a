"""What a check found: findings, each with its fix, and the report that holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from shardwright.plans.quantities import plural


class Severity(StrEnum):
    """How bad a finding is, worst first."""

    ERROR = "error"
    """The plan cannot be carried out, or gives wrong results."""
    WARNING = "warning"
    """It works, at a price that its author may not know of."""
    NOTE = "note"
    """Good to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found."""

    severity: Severity
    where: str
    """The guilty entry of the plan, or the module that lacks one."""
    message: str
    """What is wrong, and why it matters."""
    fix: str = ""
    """Lines to paste into the plan, or to write elsewhere."""
    cause: str = field(default="", compare=False)
    """Findings of one cause are one: the worst, the first of equals. Empty: stands alone."""

    def as_json(self) -> dict[str, str]:
        """As plain data."""
        return {"severity": str(self.severity), "where": self.where, "message": self.message, "fix": self.fix}

    def lines(self) -> list[str]:
        """As text."""
        indent = " " * (len(self.severity) + 2)
        fixes = [f"{indent}fix: {line}" if i == 0 else f"{indent}     {line}" for i, line in enumerate(self.fix_lines)]
        return [f"{self.severity}: {self.where}", f"{indent}{self.message}", *fixes]

    @property
    def line(self) -> str:
        """All on one line."""
        fix = f" (fix: {', '.join(self.fix_lines)})" if self.fix else ""
        return f"{self.where}: {self.message}{fix}"

    @property
    def fix_lines(self) -> list[str]:
        """The fix, line by line."""
        return self.fix.splitlines()


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All findings, the worst first. True if none is an error."""

    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.of(Severity.ERROR)

    def __bool__(self) -> bool:
        return self.ok

    def of(self, severity: Severity) -> list[Finding]:
        """Findings of one severity."""
        return [finding for finding in self.findings if finding.severity is severity]

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"ok": self.ok, "findings": [finding.as_json() for finding in self.findings]}

    @property
    def text(self) -> str:
        """Findings for people, and a line that sums them up."""
        return "\n".join([line for finding in self.findings for line in finding.lines()] + [self.summary])

    @property
    def summary(self) -> str:
        """One line."""
        counts = [plural(len(found), str(severity)) for severity in Severity if (found := self.of(severity))]
        return f"{'ok' if self.ok else 'not ok'}: {', '.join(counts) or 'nothing found'}"

    def __str__(self) -> str:
        return self.text


def merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings without those that another of the same cause says better, the worst first."""
    rank = list(Severity).index
    best: dict[str, Finding] = {}
    for number, finding in enumerate(findings):
        key = finding.cause or f"#{number}"
        if key not in best or rank(finding.severity) < rank(best[key].severity):
            best[key] = finding
    return tuple(sorted(best.values(), key=lambda finding: rank(finding.severity)))
