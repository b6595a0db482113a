"""Compare what the ranks did, call by call, with what the model did, and find the first that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardwright.plans.prove.compare import Comparison, Slicing, State, compare, slicings
from shardwright.plans.prove.record import Call
from shardwright.plans.styles import LOCAL_ROW, PACKED_ROW, Output
from shardwright.plans.table import ShardTable

Calls = Mapping[tuple[str, int], Sequence[Call]]
"""Per module and number of the call, that of every rank that made it, in the order of ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Where the ranks went wrong first."""

    module: str
    message: str
    max_abs_diff: float | None = None
    tolerance: float = 0.0
    place: int
    """Number of the call in the order of the model; what goes wrong later has a higher one."""
    state: State | None = None
    """How the output lies, if it should lie in another way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a comparison showed."""

    failure: Failure | None
    max_abs_diff: float
    tolerance: float
    modules: frozenset[str]
    """Whose outputs were compared."""
    unmatched: tuple[str, ...]
    """Whose outputs lie in no known way, although what is made of them is right."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One call and how its first output lies."""

    place: int
    call: Call
    comparison: Comparison
    others: tuple[Comparison, ...]


def judge(
    reference: Sequence[Call],
    calls: Calls,
    table: ShardTable,
    *,
    layers: Sequence[str],
    broken: tuple[str, str] | None,
    tolerance: float,
) -> Verdict:
    """Compare the calls of all ranks with those of the model.

    What counts is that every layer, and the model itself, gives every rank its whole output. What is within a layer
    may lie on the ranks in any way; it is compared to find out where a layer goes wrong.

    Args:
        reference: of the model, in order.
        calls: of the ranks.
        table: by which they cut it.
        layers: names of the layers.
        broken: module in which a rank failed, and why.
        tolerance: relative to the largest number of an output.
    """
    must_be_whole, expected = {"", *layers}, expected_states(table)
    ways = _Ways(table, layers)
    seen: list[_Seen] = []
    suspects: list[Failure] = []
    failure: Failure | None = None
    for place, call in enumerate(reference):
        ranks = calls.get((call.module, call.number), ())
        if len(ranks) < table.tp or not call.outputs:
            if call.module in must_be_whole and broken is None and len(ranks) < table.tp:
                failure = Failure(module=call.module, message="it does not run on every rank", place=place)
                break
            continue
        if any(len(other.outputs) != len(call.outputs) for other in ranks):
            suspects.append(Failure(module=call.module, message="it returns other tensors", place=place))
            continue
        found = [
            compare(output, [other.outputs[i] for other in ranks], ways.of(call.module), tolerance=tolerance)
            for i, output in enumerate(call.outputs)
        ]
        seen.append(_Seen(place, call, found[0], tuple(found[1:])))
        wanted = State.WHOLE if call.module in must_be_whole else expected.get(call.module)
        suspect = _suspect(place, call, ranks, found, wanted)
        if suspect is not None:
            suspects.append(suspect)
            if call.module in must_be_whole:
                failure = suspect
                break
    good = [c for one in seen for c in (one.comparison, *one.others) if c.state not in (State.DIVERGED, State.NOTHING)]
    if failure is not None or broken is not None:
        failure = _first(reference, suspects, failure, broken, seen)
    return Verdict(
        failure=failure,
        max_abs_diff=max((c.max_abs_diff or 0.0 for c in good), default=0.0),
        tolerance=max((c.tolerance for c in good), default=0.0),
        modules=frozenset(one.call.module for one in seen),
        unmatched=() if failure is not None else tuple(dict.fromkeys(s.module for s in suspects)),
    )


def expected_states(table: ShardTable) -> dict[str, State]:
    """How the outputs of modules lie that the plan says something of."""
    expected: dict[str, State] = {}
    for row in table.parameters:
        if row.dim is None or len(row.shape) != 2:
            continue
        for name in (row.name, *row.aliases):
            owner = name.rpartition(".")[0]
            style = table.modules.get(owner, row.style)
            if style.output is not Output.SAME:
                expected[owner] = State.WHOLE
            elif style.is_column:
                expected[owner] = State.PART
            elif style in (LOCAL_ROW, PACKED_ROW):
                expected[owner] = State.PARTIAL_SUM
    return expected


def _suspect(
    place: int, call: Call, ranks: Sequence[Call], found: Sequence[Comparison], wanted: State | None
) -> Failure | None:
    bad = next((i for i, comparison in enumerate(found) if comparison.state is State.DIVERGED), None)
    if bad is not None:
        diff, allowed = found[bad].max_abs_diff, found[bad].tolerance
        if diff is not None:
            message = f"its output differs by {diff:.3g}, and {allowed:.3g} is allowed"
        else:
            shapes = " and ".join(str(list(other.outputs[bad].shape)) for other in ranks)
            message = (
                f"its output is {shapes} on the ranks: no parts of {list(call.outputs[bad].shape)} that fit the plan"
            )
        return Failure(module=call.module, message=message, max_abs_diff=diff, tolerance=allowed, place=place)
    state = found[0].state
    if wanted is None or state in (wanted, State.NOTHING):
        return None
    message = f"its output is {state}, and should be {wanted}"
    return Failure(module=call.module, message=message, tolerance=found[0].tolerance, place=place, state=state)


def _first(
    reference: Sequence[Call],
    suspects: Sequence[Failure],
    failure: Failure | None,
    broken: tuple[str, str] | None,
    seen: Sequence[_Seen],
) -> Failure:
    """The first of what went wrong.

    A module that differs, or in which the code fails, right after one whose output nobody put together: then that one.
    """
    if suspects:
        failure = suspects[0]
    if failure is None:
        assert broken is not None
        module, message = broken
        place = next((i for i, call in enumerate(reference) if call.module == module), len(reference))
        return Failure(module=module, message=message, place=place)
    loose = _left_loose([one for one in seen if one.place < failure.place], failure)
    if loose is None:
        return failure
    return Failure(
        module=loose.call.module,
        message=f"its output stays {loose.comparison.state}, and nothing after it puts it together",
        max_abs_diff=failure.max_abs_diff,
        tolerance=failure.tolerance,
        place=loose.place,
    )


def _left_loose(seen: Sequence[_Seen], failure: Failure) -> _Seen | None:
    """The module that ends right before a failure with an output that is not whole: the innermost, if others end
    together with it.
    """
    states = {State.PARTIAL_SUM, failure.state} - {None, State.DIVERGED, State.WHOLE}
    found: _Seen | None = None
    for one in reversed(seen):
        if one.comparison.state not in states or (
            found is not None and not one.call.module.startswith(f"{found.call.module}.")
        ):
            break
        found = one
    return found


class _Ways:
    """In which ways outputs of a module may be cut: as the parameters of its layer are."""

    def __init__(self, table: ShardTable, layers: Sequence[str]) -> None:
        self._table = table
        self._layers = layers
        self._known: dict[str, list[Slicing]] = {}

    def of(self, module: str) -> list[Slicing]:
        """For one module."""
        layer = next((name for name in self._layers if f"{module}.".startswith(f"{name}.")), "")
        if layer not in self._known:
            rows = [row for row in self._table.parameters if not layer or row.name.startswith(f"{layer}.")]
            self._known[layer] = slicings(rows)
        return self._known[layer]
