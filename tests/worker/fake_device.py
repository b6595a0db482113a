"""Carry out steps of a model on a device that is none: prints what each back end's logits are.

Fake tensors have a type, a shape and a device, and operations on them complain if devices are mixed, as a GPU would.
The device is torch's place for others' devices, whose name cannot be changed twice: a program of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from transformers import AutoModelForCausalLM

from shardwright.adapt.served_model import ServedModel
from shardwright.attention.batched import BatchedBackend
from shardwright.attention.layout import AttentionBackend
from shardwright.attention.triton import TritonBackend
from shardwright.worker.packed import PackedModel
from shardwright.worker.step import StepTables

BLOCK_SIZE = 4


def move(module: nn.Module, device: torch.device) -> None:
    """Fake parameters and buffers in the place of the real ones."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                part._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def expect_on(device: torch.device, *arguments: Any, **named: Any) -> None:
    """In the place of a launch: every tensor is on the device."""
    for argument in (*arguments, *named.values()):
        if isinstance(argument, Tensor):
            assert argument.device == device, f"{argument.shape} is on {argument.device}"
        elif hasattr(argument, "tables"):
            tiles = argument
            expect_on(device, tiles.tables, tiles.starts, tiles.computed, tiles.sequence_N, tiles.token_N)


def step(num_computed: list[int], num_tokens: list[int]) -> StepTables:
    rows = np.arange(len(num_tokens))
    return StepTables(
        token_rows=np.ones((4, 32), np.int32),
        block_tables=[np.arange(1, 33, dtype=np.int32).reshape(4, 8)],
        rows=rows,
        num_computed=np.array(num_computed),
        num_tokens=np.array(num_tokens),
        logits_rows=np.cumsum(num_tokens) - 1,
    )


def main() -> None:
    """Of the model directory that the command line names."""
    backend_registration._setup_privateuseone_for_python_backend("gpu")
    device = torch.device("gpu", 0)
    module = AutoModelForCausalLM.from_pretrained(Path(sys.argv[1])).eval()
    served = ServedModel(module, num_positions=32)
    with FakeTensorMode(), torch.inference_mode():
        move(module, device)
        batched = BatchedBackend(block_size=BLOCK_SIZE, device=device, compute_dtype=torch.float32)
        backends: list[AttentionBackend] = [batched, TritonBackend(batched, device)]
        for backend in backends:
            model = PackedModel(served, backend, dtype=torch.float32, device=device, may_recompute=False)
            model.allocate(num_rows=4, num_blocks=32, block_size=BLOCK_SIZE)
            launch = mock.Mock(side_effect=lambda *arguments, **named: expect_on(device, *arguments, **named))
            where = "shardwright.attention.triton"
            with mock.patch(f"{where}.paged_attention", launch), mock.patch(f"{where}.store_rows", launch):
                for sequences in (([0, 0], [9, 5]), ([9, 5, 0], [1, 3, 4]), ([10, 8], [1, 1])):
                    logits = model.compute(step(*sequences))
                    print(type(backend).__name__, tuple(logits.shape), logits.device, launch.call_count)


if __name__ == "__main__":
    main()
