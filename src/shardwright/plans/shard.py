"""From a resolved plan to one rank's part of a model: fitted to its code, then cut."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from shardwright.errors import PlanError
from shardwright.layers.collectives import Collectives
from shardwright.plans.cut import cut
from shardwright.plans.fit import Fit, Misfit, fit
from shardwright.plans.replicate import without
from shardwright.plans.table import ShardTable
from shardwright.plans.undealt import descriptions

logger = logging.getLogger(__name__)


def shard(
    module: nn.Module, table: ShardTable, *, stage: int, collectives: Collectives, fitted: Fit | None = None
) -> None:
    """Change a model in place into what one rank runs.

    Parameters on "meta" stay there, in the shape of this rank's part; others are sliced. Those of other stages become
    empty. Every rank has the logits; `layers.parallel.gather_logits_once` lets only the first have them.

    Args:
        module: the whole model.
        table: its plan, resolved.
        stage: pipeline stage of this rank.
        collectives: of the tensor-parallel ranks of its stage; as many as the table is for.
        fitted: from `plans.fit.fit` or `fitted_table`, if the caller has it; misfits in it are cut all the same.

    Raises: PlanError if the model's code cannot run on a part of its parameters; `fitted_table` gives a table with
        which it can.
    """
    if fitted is None:
        fitted = fit(module, table)
        if fitted.misfits:
            raise PlanError(described(fitted.misfits[0], table.tp))
    cut(module, table, stage=stage, collectives=collectives, sizes=fitted.sizes)
    for parameter in module.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:  # a view, which would keep the whole
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class FittedTable:
    """A table that a model's code can be cut by."""

    table: ShardTable
    fitted: Fit
    """For `shard`."""
    replicated: tuple[Misfit, ...]
    """What the plan cuts and every rank holds all of, since the code does not let it be cut."""


def fitted_table(module: nn.Module, table: ShardTable) -> FittedTable:
    """Replicate what a model's code does not let be cut, and warn of it, and of what the table does not deal.

    Args:
        module: the whole model, on "meta" or not; left as it is.
        table: its plan, resolved.

    Returns: the same on every rank.
    """
    for description in descriptions(table):
        logger.warning("%s", description)
    found = fit(module, table)
    for misfit in found.misfits:
        logger.warning("%s; every rank holds all of it", described(misfit, table.tp))
    kept = without(table, {name for misfit in found.misfits for name in misfit.modules})
    return FittedTable(kept, Fit(found.sizes), found.misfits)


def described(misfit: Misfit, ranks: int) -> str:
    """A misfit as a sentence without its end."""
    more = f" (and {len(misfit.modules) - 1} like it)" if len(misfit.modules) > 1 else ""
    return f"{misfit.modules[0]}{more} cannot be cut for {ranks} ranks: {misfit.reason}"
