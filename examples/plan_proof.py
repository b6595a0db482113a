"""Plant a mistake in a model's parallel plan, find it without running the model, and prove the repaired plan.

python examples/plan_proof.py smollm2-135m
"""

from __future__ import annotations

import sys

from shardwright.config import ModelConfig
from shardwright.plans import ParallelPlan, check_plan, choose_plan, prove_plan
from shardwright.worker.blueprint import Blueprint


def main(model: str) -> None:
    """Check and prove two plans of a model for three ranks."""
    blueprint = Blueprint.of(ModelConfig(model=model))
    module = blueprint.build(blueprint.dtype)  # parameters on "meta": no weights are needed
    good = choose_plan(module, tp=3)
    entry = next(pattern for pattern, word in good.tp.items() if word == "rowwise")
    wrong = ParallelPlan(tp={**good.tp, entry: "colwise"}, tp_source="argument")

    print("with a mistake planted:")
    print(check_plan(module, wrong, tp=3, pp=1))
    print()
    print("as the model has it:")
    print(check_plan(module, good, tp=3, pp=1))
    proof = prove_plan(module, good, tp=3)
    print(f"proof {'holds' if proof else 'fails'}: {proof.modules_compared} modules, off by {proof.max_abs_diff:.1g}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
