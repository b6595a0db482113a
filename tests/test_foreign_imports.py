"""PyTorch's compiler comes when it is asked for, and knows what was said to it before; what trains does not come."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from shardwright.foreign_imports import compiler_off, leave_out_training, load_torch_ahead, postpone_compiler

load_torch_ahead()
leave_out_training()
postpone_compiler()
import torch
import transformers.models.llama.modeling_llama

early = sys.modules["torch._dynamo"]
for absent in ("torch._dynamo.eval_frame", "torch.distributed.tensor", "scipy.optimize", "sympy"):
    assert absent not in sys.modules, absent


@torch.compiler.allow_in_graph
def opaque(x):
    open(sys.executable).close()  # which it cannot follow
    return x.sin()


@torch.compiler.disable
def apart(x):
    return x + 1


assert "torch._dynamo.eval_frame" not in sys.modules, "marking does not take it"
with compiler_off():
    with compiler_off():
        import torch._dynamo.config
    assert type(early).__name__ == "module", "now it is there"
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
assert torch._dynamo.eval_frame._stance.stance == "default"
assert torch._dynamo is early is sys.modules["torch._dynamo"]
x = torch.ones(3)
assert torch.equal(torch.compile(lambda x: opaque(x * 2), backend="eager", fullgraph=True)(x), (x * 2).sin())
assert torch.equal(apart(x), x + 1)
print("done")
"""


def test_the_compiler_is_put_off_and_training_left_out() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "done", run.stderr[-3000:]


def test_what_is_marked_can_be_called_before_anything_else_asks_for_the_compiler() -> None:
    script = """
import sys
from shardwright.foreign_imports import postpone_compiler
postpone_compiler()
import torch


@torch.compiler.disable
def apart(x):
    return x + 1


@torch._disable_dynamo  # as PyTorch marks its own
def own(x):
    return x + 2


x = torch.ones(3)
assert "torch._dynamo.eval_frame" not in sys.modules
for _ in range(2):
    assert torch.equal(own(x), x + 2)
    assert torch.equal(apart(x), x + 1)
print("done")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "done", run.stderr[-3000:]


def test_a_compiler_that_is_there_stays() -> None:
    script = """
import torch._dynamo
from shardwright.foreign_imports import compiler_off, postpone_compiler
before = torch._dynamo
postpone_compiler()
assert torch._dynamo is before and type(before).__name__ == "module"
with compiler_off():
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
assert torch._dynamo.eval_frame._stance.stance == "default"
print("done")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "done", run.stderr[-3000:]
