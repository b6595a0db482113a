"""Every kernel compiles to machine code for GPUs, which takes none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""That a program may have, per compute capability. That of 80 is what workstation cards of the generations up to 89
have; an A100 has more."""


@pytest.mark.sweep
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_and_fit(capability: int) -> None:
    command = [sys.executable, "-m", "tests.kernels.triton.compile_all", str(capability)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout.splitlines()[-1])
    assert all(taken.values())
    assert max(size for sizes in taken.values() for size in sizes) <= SHARED_BYTES[capability]
