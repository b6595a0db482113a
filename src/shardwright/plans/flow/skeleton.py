"""Runs a copy of a module on a few tokens, to record what it does. The module itself stays as it is."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shardwright.plans.flow.record import Recorder, Trace, tensors_in, watch

logger = logging.getLogger(__name__)

NUM_TOKENS = 5

MOST_REAL_BYTES = 4 << 30
"""Of weights that are made up, where code looks at values that depend on them."""


def trace_forward(module: nn.Module) -> Trace:
    """Record one forward pass of a module on a few tokens.

    It runs on "meta". If its code looks at values that only weights tell, it runs with small random weights.

    Raises: whatever the code raises if it runs neither way.
    """
    try:
        return _trace(module, on_meta=True)
    except Exception as exc:
        logger.debug("no forward pass on meta: %s: %s", type(exc).__name__, exc)
        if sum(p.numel() for p in module.parameters()) * 4 > MOST_REAL_BYTES:
            raise
    return _trace(module, on_meta=False)


def _trace(module: nn.Module, *, on_meta: bool) -> Trace:
    skeleton = copied(module, on_meta=on_meta).eval()
    trace = Trace()
    recorder = Recorder(trace)
    for name, parameter in skeleton.named_parameters():
        ref = recorder.mark_varying(parameter)
        trace.parameters[ref.storage] = name
        trace.refs[name] = ref
    watch(recorder, skeleton)
    input_ids = torch.arange(1, NUM_TOKENS + 1)[None]
    signature = inspect.signature(skeleton.forward)
    first = next(iter(signature.parameters), "input_ids")
    options = {"use_cache": False} if "use_cache" in signature.parameters else {}
    trace.inputs[first] = recorder.mark_varying(input_ids)
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), recorder:
        output = skeleton(input_ids, **options)
    trace.outputs = tuple(recorder.ref(v) for v in tensors_in(output))
    return trace


def copied(module: nn.Module, *, on_meta: bool) -> nn.Module:
    """A copy of a module: parameters on "meta" or made up, buffers as they are."""
    copies: dict[int, Any] = {}
    for tensor in _held(module):
        is_parameter = isinstance(tensor, nn.Parameter)
        if on_meta:
            copied = torch.empty_like(tensor, device="meta") if is_parameter else tensor.detach().clone()
        elif is_parameter or tensor.is_meta:
            seed = np.random.default_rng(0)
            copied = torch.from_numpy(seed.standard_normal(tuple(tensor.shape), dtype=np.float32)) * 0.02
            copied = copied.to(tensor.dtype)
        else:
            copied = tensor.detach().clone()
        copies[id(tensor)] = nn.Parameter(copied, requires_grad=False) if is_parameter else copied
    return copy.deepcopy(module, copies)


def _held(module: nn.Module) -> Iterator[Tensor]:
    for owner in module.modules():
        yield from _tensors(vars(owner))


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)
