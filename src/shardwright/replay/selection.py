"""Where a step goes over from all its tokens to those whose logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.replay.affine import Recording
from shardwright.replay.instructions import Instruction, Operation


def find_selection(
    instructions: Sequence[Instruction], uses: Sequence[frozenset[int]], recording: Recording
) -> int | None:
    """The one instruction that takes the wanted tokens out.

    Args:
        instructions: of a step.
        uses: storages that each reads or writes.
        recording: of the step.

    Returns: its place; None if there is none, or if what comes after it looks at other tokens, too.
    """
    wanted = recording.inputs.get("logits_rows")
    places = [place for place, used in enumerate(uses) if wanted in used]
    if len(places) != 1:
        return None
    selection = places[0]
    chosen = instructions[selection]
    if chosen.operation is not Operation.ROWS or chosen.tensors[2] is None or chosen.tensors[2].storage != wanted:
        return None
    before = frozenset(recording.inputs.values()).union(*uses[:selection])
    after = frozenset({recording.output.storage}).union(*uses[selection + 1 :])
    return None if (before & after) - recording.constants.keys() else selection
