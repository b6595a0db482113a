"""Run parts of a model before it has weights, whole and cut, to see whether the parts of its ranks make the whole.

Weights are made up. Each is a view of a short vector of random numbers in which every row begins at another place, so
no two rows or columns are alike, and a layer of any size takes hardly any memory.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.layers.parallel_width import is_features
from shardwright.plans.table import ShardTable

TOLERANCE = 1e-4
"""Of the largest difference to the largest value. Rounding gives some 1e-6, a wrong head some 1e-1."""

STRIDES = (1, 3, 7, 11, 13)
"""Of made-up weights, last dimension first."""


@dataclass(frozen=True, slots=True)
class Call:
    """How a module was called in a forward pass of the whole model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def repeat(self, module: nn.Module) -> Tensor:
        """The first tensor of what a module returns for the same arguments. Raises whatever its code raises."""
        return first_tensor(module(*copy.deepcopy(self.args), **copy.deepcopy(self.kwargs)))

    def width(self) -> int | None:
        """Last dimension of the first features that it was given; None if there were none."""
        return next((v.shape[-1] for v in (*self.args, *self.kwargs.values()) if is_features(v)), None)


class _Enough(Exception):
    """All calls that were asked for have been seen."""


@torch.no_grad()
def rehearse(module: nn.Module, names: Iterable[str], *, num_tokens: int) -> dict[str, Call]:
    """Run a model with made-up weights on a few tokens, and keep the first call of some of its modules.

    Args:
        module: the whole model, with weights or on "meta"; left as it is.
        names: qualified names of modules in it.
        num_tokens: length of the one sequence.

    Returns: by name; modules that were not called are not in it.
    Raises: whatever the model's code raises.
    """
    made_up = with_made_up_weights(module)
    calls: dict[str, Call] = {}
    wanted = set(names)

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in calls:
                calls[name] = Call(*copy.deepcopy((args, kwargs)))
            if calls.keys() == wanted:
                raise _Enough

        return hook

    for name in wanted:
        made_up.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True)
    _run(made_up, num_tokens)
    return calls


@torch.no_grad()
def first_outputs(module: nn.Module, names: Iterable[str], outputs: dict[str, Tensor], *, num_tokens: int) -> None:
    """Run a model on a few tokens until some of its modules have been called.

    Args:
        module: gets hooks.
        names: qualified names of modules in it.
        outputs: filled with the first tensor of what each of them first returns.
        num_tokens: length of the one sequence.

    Raises: whatever the model's code raises.
    """
    wanted = set(names)

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            outputs.setdefault(name, first_tensor(output).clone())
            if outputs.keys() == wanted:
                raise _Enough

        return hook

    for name in wanted:
        module.get_submodule(name).register_forward_hook(after(name))
    _run(module, num_tokens)


def _run(module: nn.Module, num_tokens: int) -> None:
    options = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}
    with suppress(_Enough):
        module(torch.arange(1, num_tokens + 1)[None], **options)


def difference(output: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the largest value that is expected; infinite for another shape."""
    if output.shape != expected.shape:
        return torch.inf
    largest = (output.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(largest.nan_to_num(torch.inf))


def with_made_up_weights(module: nn.Module) -> nn.Module:
    """A copy of a module in float32 on the CPU, whose parameters are made up; buffers are shared where they can be."""
    memo: dict[int, Any] = {}
    for number, parameter in enumerate(module.parameters()):
        memo[id(parameter)] = nn.Parameter(made_up_weight(parameter, seed=number), requires_grad=False)
    for buffer in module.buffers():
        if not buffer.is_meta:
            memo[id(buffer)] = buffer.float() if buffer.is_floating_point() else buffer
    copied = copy.deepcopy(module, memo)
    for held in copied.modules():
        config: Any = getattr(held, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # others take no weights whose rows overlap
    return copied


def made_up_weight(like: Tensor, *, seed: int) -> Tensor:
    """Numbers in the shape of a parameter, such that sums over its last dimension are of moderate size."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    generator = torch.Generator().manual_seed(seed)
    if like.ndim < 2:
        return torch.rand(like.shape, generator=generator) + 0.5
    strides = STRIDES[: like.ndim][::-1]
    length = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, strides, strict=True))
    numbers: Tensor = torch.randn(length, generator=generator) / float(like.shape[-1]) ** 0.5
    return numbers.as_strided(tuple(like.shape), strides)


def table_below(table: ShardTable, name: str) -> ShardTable:
    """The table of one module of a model alone, with names as it has them, on one stage."""
    prefix = f"{name}."

    def inner(names: Iterable[str]) -> list[str]:
        return [n.removeprefix(prefix) for n in names if n.startswith(prefix)]

    rows = []
    for row in table.parameters:
        if found := inner((row.name, *row.aliases)):
            rows.append(replace(row, name=found[0], aliases=tuple(found[1:]), stages=(0,)))
    modules = {
        n.removeprefix(prefix) if n != name else "": s for n, s in table.modules.items() if inner([n]) or n == name
    }
    return replace(table, pp=1, parameters=tuple(rows), modules=modules, stages=table.stages[:1])


def first_tensor(output: Any) -> Tensor:
    """The first tensor of whatever a module returns. Raises TypeError if there is none."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    for value in values:
        if isinstance(value, Tensor | list | tuple | dict):
            return first_tensor(value)
    raise TypeError(f"there is no tensor in a {type(output).__name__}")
