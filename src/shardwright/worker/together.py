"""What is computed together in a model's steps, for those who look at it: `shardwright inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from shardwright.adapt.served_model import ServedModel
from shardwright.layers.few_launches import FewLaunches
from shardwright.replay.passes import passes_of
from shardwright.worker.packed import PackedModel
from shardwright.worker.step import StepModel

MOST_TOKENS, MOST_ROWS = 64, 8
"""Of the steps that are recorded to be looked at."""


def describe_steps(model: StepModel | ServedModel, *, num_positions: int, vocab_size: int) -> dict[str, Any]:
    """Whether a model's steps can be recorded on a CPU, and what is then carried out together.

    Args:
        model: on its rung, weights loaded, on the CPU; or what is known of one that is not run.
        num_positions: longest sequence.
        vocab_size: number of token ids.
    """
    if isinstance(model, ServedModel):
        return not_recorded("a model of this size is not run to be looked at")
    if not isinstance(model, PackedModel):
        return not_recorded("requests are not computed in one pass")
    problem = model.record(
        num_positions=num_positions, vocab_size=vocab_size, most_tokens=MOST_TOKENS, most_rows=MOST_ROWS
    )
    if problem is not None or model.program is None:
        return not_recorded(problem or "")
    passes = passes_of(model.program)
    return {
        "recorded": True,
        "reason": "",
        "step": asdict(passes.step),
        "layer": None if passes.layer is None else asdict(passes.layer),
        "by_torch": passes.by_torch,
        "products": [[_owner(weight, model.served.module) for weight in weights] for weights in passes.products],
        "runs": [
            {"what": run.what, "operations": run.operations, "count": count}
            for run, count in Counter(passes.runs).most_common()
        ],
    }


def describe_launches(model: StepModel | ServedModel, *, without: Sequence[str]) -> list[dict[str, str]]:
    """Modules that our kernels for GPUs would compute; a model that is not run is not looked at."""
    if not isinstance(model, PackedModel):
        return []
    found = FewLaunches(model.served.module, without)
    norms = [{"module": name, "what": "norm", "by": "one launch"} for name in found.norms]
    gated = [{"module": name, "what": "gated", "by": "one product and one launch"} for name in found.gated]
    return norms + gated


def not_recorded(reason: str) -> dict[str, Any]:
    """Steps that run the model's own code."""
    return {"recorded": False, "reason": reason, "step": None, "layer": None, "by_torch": 0, "products": [], "runs": []}


def _owner(weight: Tensor, module: nn.Module) -> str:
    """The name of the module that holds a weight, or that which it is a part of; empty if none does."""
    address = weight.data_ptr()
    for name, parameter in module.named_parameters():
        if parameter.data_ptr() <= address < parameter.data_ptr() + parameter.nbytes:
            return name.rpartition(".")[0]
    return ""
