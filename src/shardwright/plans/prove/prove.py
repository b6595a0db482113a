"""The proof: N simulated ranks run the sharded model in one process, beside the model as it is written."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.plan import ParallelPlan, plan_of
from shardwright.plans.prove.blame import find_blame
from shardwright.plans.prove.compare import TOLERANCE
from shardwright.plans.prove.report import Divergence, ProofReport
from shardwright.plans.prove.subject import prepare
from shardwright.plans.prove.trial import Bench

Progress = Callable[[str], None]


def prove_plan(
    model: nn.Module | Callable[[], nn.Module],
    plan: ParallelPlan | None = None,
    *,
    tp: int = 2,
    pp: int = 1,
    weights: bool = False,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> ProofReport:
    """Prove that a model cut by a plan gives what the model gives.

    The sharded modules are those that are served. Every module's output is compared, in float32, with the one of the
    model as it is written, on the same random tokens.

    Args:
        model: a causal language model, on "meta" or not, which is not changed; or a function that returns one.
        plan: to be proved; default: the one that the model carries.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        weights: prove it with the weights that the model has; default: with random ones, and large models of
            Transformers on a smaller one of the same structure.
        seed: of random weights and tokens.
        tolerance: largest difference that is allowed, relative to the largest number of an output.
        progress: is told what is done.

    Returns: whether it holds; if not, the first module that differs, the entry that is likely at fault, and a fix.
    Raises: PlanError if the plan cannot be carried out, or the model itself cannot be run.
    """
    if min(tp, pp) < 1:
        raise PlanError(f"a proof is of 1 rank and 1 stage at least, not tp={tp} and pp={pp}")
    say = progress or (lambda _: None)
    say("running the model as it is")
    names = () if plan is None else (*plan.tp, *plan.pp)
    subject = prepare(model, tp=tp, pp=pp, names=names, own_weights=weights, seed=seed)
    if plan is None:
        plan = plan_of(subject.module)
    say(f"running {tp * pp} ranks")
    bench = Bench(subject=subject, tp=tp, pp=pp, tolerance=tolerance)
    trial = bench.try_plan(plan)
    verdict = trial.verdict
    notes = list(subject.notes)
    if tp > 1 and all(row.dim is None for row in trial.table.parameters):
        notes.append("the plan cuts no parameter: every rank computes everything")
    if verdict.unmatched:
        shown = ", ".join(verdict.unmatched[:3]) + (", ..." if len(verdict.unmatched) > 3 else "")
        notes.append(f"{len(verdict.unmatched)} modules cannot be compared by themselves, their layers agree: {shown}")
    divergence = None
    if verdict.failure is not None:
        say(f"looking for what is wrong at {verdict.failure.module or 'the end'}")
        blame = find_blame(bench, trial, verdict.failure)
        divergence = Divergence(
            module=verdict.failure.module,
            max_abs_diff=verdict.failure.max_abs_diff,
            tolerance=verdict.failure.tolerance,
            message=verdict.failure.message,
            likely_entry=blame.entry,
            fix=blame.fix,
            fix_holds=blame.holds,
        )
    return ProofReport(
        tp=tp,
        pp=pp,
        max_abs_diff=max(verdict.max_abs_diff, 0.0 if divergence is None else divergence.max_abs_diff or 0.0),
        tolerance=verdict.tolerance if divergence is None else divergence.tolerance,
        modules_compared=len(verdict.modules),
        first_divergence=divergence,
        notes=tuple(notes),
    )
