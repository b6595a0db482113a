"""What shows once a trace was gone through: where divided dimensions are cut, and what no two ranks may share."""

from __future__ import annotations

import numpy as np

from shardwright.plans.flow.atoms import Atoms, Labels, distinct
from shardwright.plans.flow.state import Flow


def settle(flow: Flow) -> None:
    """Bind what code divides together, and what must not be on two ranks though several need it."""
    before = -1
    while (now := _num_bound(flow)) != before:
        before = now
        together = flow.atoms.with_needs_bound()
        for labels in flow.splits:
            _bind_split(flow, flow.atoms.find(labels), together)
        holders, needed = flow.atoms.needs()
        shared = np.isin(needed, closed_atoms(flow)) | (holders == 0)
        flow.atoms.bind(holders[shared], needed[shared])


def _num_bound(flow: Flow) -> int:
    every = np.concatenate([np.zeros(1, np.int64), *(axis.atoms for axis in flow.axes)])
    return len(distinct(flow.atoms.find(every)))


def _bind_split(flow: Flow, labels: Labels, together: Atoms) -> None:
    """Of a dimension that is divided in several, one is cut: the outermost whose entries share nothing.

    Keys and values of a head are two entries of `[keys, values]` that share the query heads which need both, so that it
    is rather the heads in each of them that are cut.

    Args:
        flow: state.
        labels: one dimension for each part that the dimension is divided in.
        together: atoms, in which who needs is bound to what it needs.
    """
    entries = _apart(together.find(labels))
    if entries is None:
        entries = _apart(labels, partly=True) or []
    for entry in entries:
        present = distinct(labels[entry])
        present = present[present > 0]
        flow.atoms.bind(present, present[:1])


def _apart(labels: Labels, *, partly: bool = False) -> list[tuple[int, ...]] | None:
    """Places of the outermost entries that share nothing; None if there are none, or (but `partly`) none in some."""
    rows = labels.reshape(len(labels), -1)
    sets = [set(row.tolist()) - {0} for row in rows]
    if len(labels) > 1 and sum(map(len, sets)) == len(set().union(*sets)) and all(sets):
        return [(number,) for number in range(len(labels))]
    if labels.ndim == 1:
        return None
    found: list[tuple[int, ...]] = []
    for number, part in enumerate(labels):
        inner = _apart(part, partly=partly)
        if inner is None and not partly:
            return None
        found += [(number, *place) for place in inner or ()]
    return found or None


def closed_atoms(flow: Flow) -> Labels:
    """Atoms that products sum over: what units are made of."""
    every = [np.zeros(1, np.int64), *(c.labels.ravel() for c in flow.closings)]
    found = distinct(flow.atoms.find(np.concatenate(every)))
    return found[found > 0]
