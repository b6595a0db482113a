from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest


def test_nested_calls_are_not_counted_twice() -> None:
    from profile_step import Stopwatch

    watch = Stopwatch()
    inner = watch.timed("inner", lambda: time.sleep(0.05))
    outer = watch.timed("outer", lambda: (inner(), inner(), time.sleep(0.02)))
    start = time.perf_counter()
    outer()
    elapsed = time.perf_counter() - start
    assert watch.calls == {"inner": 2, "outer": 1}
    assert watch.seconds["inner"] >= 0.1
    assert watch.seconds["outer"] >= 0.02
    assert sum(watch.seconds.values()) == pytest.approx(elapsed, rel=0.05)


def test_what_is_carried_out_as_one_is_one_piece() -> None:
    from profile_step import pieces

    from shardwright.replay.instructions import MOST_VALUES, WIDTH, Operation

    instructions = np.zeros((7, WIDTH), dtype=np.int64)
    operations = ["LINEAR", "LINEAR", "LINEAR", "ADD", "MUL", "MUL", "ATTENTION"]
    instructions[:, 0] = [Operation[name] for name in operations]
    instructions[1, 1] = 1  # with the one before
    instructions[3, MOST_VALUES] = 2  # and the one after
    assert pieces(instructions) == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]


@pytest.mark.parametrize("more", [[], ["--enforce-eager"]])
def test_stages_add_up_to_the_whole(tiny_llama: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    import profile_step

    from shardwright.worker.sampler import Sampler

    before = Sampler.__call__
    profile_step.main([str(tiny_llama), "--dtype", "float32", "--output-tokens", "4", "--requests", "2", *more])
    assert Sampler.__call__ is before
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([\d.]+) \|", capsys.readouterr().out, flags=re.MULTILINE))
    whole = float(rows.pop("all, mean of 4 steps"))
    assert ("recorded forward" in rows) == (not more)
    assert {"schedule", "batch building", "sampling", "output handling"} <= set(rows)
    stages = {label for _, _, label in profile_step.STAGES} | {profile_step.OUTSIDE}
    assert sum(float(took) for label, took in rows.items() if label in stages) == pytest.approx(whole, abs=0.01)
