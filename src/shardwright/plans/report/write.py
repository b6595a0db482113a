"""A plan as a file: for `--tp-plan` and `--pp-plan`, or in a model's config, where other engines look for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.document import parse_text
from shardwright.plans.plan import ParallelPlan, base_prefix

CONFIG = "config.json"


def write_plan(plan: ParallelPlan, path: Path, module: nn.Module) -> None:
    """Write a plan.

    Args:
        plan: to write.
        path: ending in .json, .yaml or .yml; of a `config.json` that is there, the plan becomes a part: entries of the
            base model as `base_model_tp_plan` and `base_model_pp_plan`, which Transformers and vLLM read.
        module: the model that it is for.

    Raises: PlanError if the file cannot be written.
    """
    try:
        if path.name == CONFIG and path.is_file():
            config = parse_text(path.read_text(encoding="utf-8"), is_json=True, where=str(path))
            if not isinstance(config, dict):
                raise PlanError(f"{path} holds no JSON object: it is no model config")
            text = json.dumps(config | of_base(plan, module), indent=2) + "\n"
        elif path.suffix in (".yaml", ".yml"):
            text = yaml.safe_dump(plan.as_document(), sort_keys=False, width=120)
        elif path.suffix == ".json":
            text = json.dumps(plan.as_document(), indent=2) + "\n"
        else:
            raise PlanError(f"a plan is written to a .json or .yaml file, not to {path}")
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise PlanError(f"the plan cannot be written to {path}: {exc.strerror}") from exc


def of_base(plan: ParallelPlan, module: nn.Module) -> dict[str, Any]:
    """The part of a plan that a config carries: names within the base model.

    A table of tokens that is the weight of a head beside the base model is left out where nothing tells Transformers
    that the head is cut too.
    """
    prefix = base_prefix(module, ())
    within = f"{prefix}." if prefix else ""
    outside = {
        id(parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not name.startswith(within)
        and name.rpartition(".")[0] not in (getattr(type(module), "_tp_plan", None) or {})
    }
    shared = {name for name, held in module.named_modules() if id(getattr(held, "weight", None)) in outside}

    def below(entries: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(within): value for name, value in entries.items() if name.startswith(within)}

    document = plan.as_document()
    tp = {name: word for name, word in document["tp_plan"].items() if name not in shared}
    return {"base_model_tp_plan": below(tp), "base_model_pp_plan": below(document["pp_plan"])}
