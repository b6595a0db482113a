"""Arguments for a module's forward beside the tokens: none that it does not ask for.

Where the code demands more than tokens, it gets what they are for a whole prompt that nothing comes before: positions
from zero on, a mask that hides nothing, an empty past. What is meant is known by its name alone, so others are left out
and the call fails, which names them.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.adapt.probe import accepts

_FLAT_POSITIONS = re.compile(r"input_pos|cache_position")
_POSITIONS = re.compile(r"pos|positions?|pos_ids|position_ids|position_indices")
_MASKS = re.compile(r"(\w+_)?mask")
_STARTS = re.compile(r"start|start_pos|offset|cur_len|(past|prefix|cache|kv)_(len|length|seq_len)|seq_offset")
_ABSENT = re.compile(r"targets?|labels?|y|past\w*|(\w+_)?caches?|(\w+_)?states?|memory|mems?|inputs_embeds")


def without_cache(module: nn.Module) -> dict[str, Any]:
    """Arguments that keep a module's forward from making a cache, if it has one."""
    return {"use_cache": False} if accepts(module, "use_cache", or_any=True) else {}


def plain_arguments(module: nn.Module, input_ids: Tensor) -> dict[str, Any]:
    """Arguments that go with tokens in a plain forward pass.

    Args:
        module: whose forward takes the tokens first.
        input_ids: [1, T] int64.
    """
    arguments = without_cache(module)
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            arguments |= _demanded(parameter.name, input_ids)
    return arguments


def _demanded(name: str, input_ids: Tensor) -> dict[str, Any]:
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    if _FLAT_POSITIONS.fullmatch(name):
        return {name: positions}
    if _POSITIONS.fullmatch(name):
        return {name: positions[None]}
    if _MASKS.fullmatch(name):
        return {name: torch.ones_like(input_ids)}
    if _STARTS.fullmatch(name):
        return {name: 0}
    return {name: None} if _ABSENT.fullmatch(name) else {}


def with_positions(arguments: dict[str, Any], position_ids: Tensor) -> dict[str, Any]:
    """The arguments with other positions ([T] int64), where there are any."""
    answers = {}
    for name in arguments:
        if _FLAT_POSITIONS.fullmatch(name):
            answers[name] = position_ids
        elif _POSITIONS.fullmatch(name):
            answers[name] = position_ids[None]
    return arguments | answers
