"""What a proof found, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """The first place where the sharded model is not the model."""

    module: str
    """Qualified name; empty for the model itself."""
    max_abs_diff: float | None
    """Largest difference between its output and what it should be; None if there is no output of the right shape."""
    tolerance: float
    """What would have been allowed there."""
    message: str
    """What is wrong there, in words."""
    likely_entry: str | None = None
    """The pattern of the plan that is most likely at fault, or is missing."""
    fix: str | None = None
    """A line to paste into the plan, or what to do."""
    fix_holds: bool = False
    """Whether the proof was run again with the fix, and held."""

    def as_json(self) -> dict[str, Any]:
        """Plain data, as `plan prove --json` prints it."""
        return {
            "module": self.module,
            "max_abs_diff": self.max_abs_diff,
            "message": self.message,
            "likely_entry": self.likely_entry,
            "fix": self.fix,
            "fix_holds": self.fix_holds,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ProofReport:
    """Whether a plan gives the model's own results. True if it does."""

    tp: int
    pp: int
    max_abs_diff: float
    """Largest difference between any two outputs that should be the same."""
    tolerance: float
    """Where it holds: the largest difference that was allowed for any module; else at the first that diverges."""
    modules_compared: int
    """Modules of the model whose outputs were found again in the sharded one."""
    first_divergence: Divergence | None = None
    notes: tuple[str, ...] = ()
    """What was shrunk, what could not be compared."""
    dtype: str = "float32"

    @property
    def ok(self) -> bool:
        """Whether the proof holds."""
        return self.first_divergence is None

    def __bool__(self) -> bool:
        return self.ok

    def as_json(self) -> dict[str, Any]:
        """Plain data, as `plan prove --json` prints it."""
        return {
            "ok": self.ok,
            "tp": self.tp,
            "pp": self.pp,
            "dtype": self.dtype,
            "max_abs_diff": self.max_abs_diff,
            "tolerance": self.tolerance,
            "modules_compared": self.modules_compared,
            "first_divergence": None if self.first_divergence is None else self.first_divergence.as_json(),
            "notes": list(self.notes),
        }
