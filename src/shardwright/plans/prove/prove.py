"""The proof: N simulated ranks run the sharded model in one process, beside the model as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.fit import Misfit
from shardwright.plans.plan import ParallelPlan, plan_of
from shardwright.plans.prove.blame import Blame, find_blame
from shardwright.plans.prove.compare import TOLERANCE
from shardwright.plans.prove.judge import Failure, Verdict
from shardwright.plans.prove.pipeline_names import Unnamed, unnamed_arguments
from shardwright.plans.prove.report import Divergence, ProofReport
from shardwright.plans.prove.subject import prepare
from shardwright.plans.prove.trial import Bench, Trial
from shardwright.plans.shard import described
from shardwright.plans.undealt import descriptions

Progress = Callable[[str], None]


def prove_plan(
    model: nn.Module | Callable[[], nn.Module],
    plan: ParallelPlan | None = None,
    *,
    tp: int = 2,
    pp: int = 1,
    pp_split: Sequence[int] | None = None,
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
        pp_split: layers per stage; default: balanced by bytes. All layers are then proved, of large models too.
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
    if pp_split is not None and len(pp_split) != pp:
        raise PlanError(f"pp split {','.join(map(str, pp_split))} names {len(pp_split)} stages, and pp is {pp}")
    say = progress or (lambda _: None)
    say("running the model as it is")
    names = () if plan is None else (*plan.tp, *plan.pp)
    subject = prepare(
        model, tp=tp, pp=pp, names=names, own_weights=weights, seed=seed, keep_layers=pp_split is not None
    )
    if plan is None:
        plan = plan_of(subject.module)
    say(f"running {tp * pp} ranks")
    bench = Bench(subject=subject, tp=tp, pp=pp, pp_split=pp_split, tolerance=tolerance)
    trial = bench.try_plan(plan)
    notes = list(subject.notes)
    divergence = None
    while trial.verdict.failure is not None and divergence is None:
        say(f"looking for what is wrong at {trial.verdict.failure.module or 'the end'}")
        divergence, misfit = _explained(bench, trial, trial.verdict.failure)
        if misfit is not None:
            notes.append(f"{described(misfit, tp)}; every rank holds all of it")
            trial = bench.try_plan(plan, fitted=trial.fitted, whole=(*trial.whole, *misfit.modules))
    verdict = trial.verdict
    notes += descriptions(trial.table)
    if tp > 1 and all(row.dim is None for row in trial.table.parameters):
        notes.append("the plan cuts no parameter: every rank computes everything")
    if verdict.unmatched:
        shown = ", ".join(verdict.unmatched[:3]) + (", ..." if len(verdict.unmatched) > 3 else "")
        notes.append(f"{len(verdict.unmatched)} modules cannot be compared by themselves, their layers agree: {shown}")
    if divergence is None and trial.pipeline is not None:
        unnamed = unnamed_arguments(subject.module, plan, trial.table, trial.pipeline)
        if unnamed is not None and unnamed.is_all:
            divergence = _not_handed_over(unnamed, verdict)
        elif unnamed is not None:
            notes.append(f"stages hand over {', '.join(unnamed.arguments)} too, which {unnamed.entry!r} does not name")
    return ProofReport(
        tp=tp,
        pp=pp,
        max_abs_diff=max(verdict.max_abs_diff, 0.0 if divergence is None else divergence.max_abs_diff or 0.0),
        tolerance=verdict.tolerance if divergence is None else divergence.tolerance,
        modules_compared=len(verdict.modules),
        first_divergence=divergence,
        notes=tuple(notes),
    )


def _explained(bench: Bench, trial: Trial, failure: Failure) -> tuple[Divergence, None] | tuple[None, Misfit]:
    """What is at fault: an entry of the plan; the pipeline, if the plan holds without it; or neither, if the model's
    code does not run on parts, and every rank will hold all of them when it is served.
    """
    blame, message = Blame(None), failure.message
    alone = trial if bench.pp == 1 else bench.on_one_stage().try_plan(trial.plan, whole=trial.whole)
    if alone.verdict.failure is None:
        blame = Blame(next((name for name in trial.plan.pp if f"{failure.module}.".startswith(f"{name}.")), None))
        message += "; on one stage the plan holds, so what stages hand over is at fault"
    elif bench.tp > 1:
        failure, message = alone.verdict.failure, alone.verdict.failure.message
        blame = find_blame(bench.on_one_stage(), alone, failure)
        misfit = _misfit(trial, failure)
        if misfit is not None and blame.cuts_less:
            return None, misfit
    divergence = Divergence(
        module=failure.module,
        max_abs_diff=failure.max_abs_diff,
        tolerance=failure.tolerance,
        message=message,
        likely_entry=blame.entry,
        fix=blame.fix,
        fix_holds=blame.holds,
    )
    return divergence, None


def _misfit(trial: Trial, failure: Failure) -> Misfit | None:
    """What the model's code does not let be cut, if that is why it failed; not if it ran, and gave other numbers."""
    if failure.max_abs_diff is not None:
        return None
    left = [misfit for misfit in trial.fitted.misfits if misfit.modules[0] not in trial.whole]
    above = (m for m in left if any(f"{failure.module}.".startswith(f"{n}.") for n in m.modules))
    return next(above, left[0] if left else None)  # the code that failed may have been given parts by another's


def _not_handed_over(unnamed: Unnamed, verdict: Verdict) -> Divergence:
    return Divergence(
        module=unnamed.entry,
        max_abs_diff=None,
        tolerance=verdict.tolerance,
        message=f"the next stage needs {', '.join(unnamed.arguments)}, and the plan's inputs name none of that",
        likely_entry=unnamed.entry,
        fix=unnamed.fix,
        fix_holds=True,
    )
