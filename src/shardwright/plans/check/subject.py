"""What is checked: a model and a plan, brought together once for all families of findings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.dataflow import Dataflow, trace_dataflow
from shardwright.plans.groups import Member, UnitGroup
from shardwright.plans.patterns import matches, specificity
from shardwright.plans.plan import ParallelPlan
from shardwright.plans.quantization import Quantization
from shardwright.plans.resolve import acts, cut_dimension, has_inputs_first, matching_pattern, parameters_of, resolve
from shardwright.plans.stages import layer_stack
from shardwright.plans.styles import REPLICATE, Cut, Input, Output, Style
from shardwright.plans.table import ShardTable

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

LIKE = 0.7
"""Of letters in common: two words that are nearly spelled alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A parameter, and what the plan says of it."""

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    num_bytes: int
    owner: nn.Module
    pattern: str | None
    """The entry that decides over it."""
    style: Style
    dim: int | None
    """The dimension that is cut."""

    @property
    def module(self) -> str:
        """Qualified name of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix or the bias of a linear."""
        return is_linear(self.owner)

    @property
    def output_dim(self) -> int | None:
        """The dimension of a linear's output features; None for what is no linear's."""
        if not self.is_linear:
            return None
        return 1 if has_inputs_first(self.owner) and len(self.shape) == 2 else 0

    @property
    def input_dim(self) -> int | None:
        """The dimension of a linear's input features; None for what has none."""
        if not self.is_linear or len(self.shape) != 2:
            return None
        return 0 if has_inputs_first(self.owner) else 1


def nearest(pattern: str, names: Iterable[str]) -> str | None:
    """Of names as a plan would write them, the one that a pattern which matches nothing may mean.

    Its last level must look like the pattern's: what is wrong is there by a few letters, or on the way there.
    """
    best = max(set(names), key=lambda name: (_likeness(pattern, name), name), default=None)
    return best if best is not None and _likeness(pattern, best) > 0 else None


def _likeness(left: str, right: str) -> float:
    """How much two names look alike; 0 if they do not."""
    last = difflib.SequenceMatcher(None, left.rpartition(".")[2], right.rpartition(".")[2]).ratio()
    whole = difflib.SequenceMatcher(None, left, right).ratio()
    return last + whole if last >= LIKE else 0.0


def is_typo(pattern: str, name: str) -> bool:
    """Whether two names differ by a few letters in one level."""
    levels = list(zip(pattern.split("."), name.split("."), strict=False))
    differ = [pair for pair in levels if pair[0] != pair[1]]
    same_depth = pattern.count(".") == name.count(".")
    return same_depth and len(differ) == 1 and difflib.SequenceMatcher(None, *differ[0]).ratio() >= LIKE


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix that its input is multiplied with."""
    return isinstance(module, nn.Linear) or has_inputs_first(module)


def is_stack(weight: Weight) -> bool:
    """Whether a parameter holds the matrices of several experts."""
    return len(weight.shape) == 3 and not isinstance(weight.owner, CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, its plan, and for how many ranks."""

    module: nn.Module
    plan: ParallelPlan
    tp: int
    pp: int
    pp_split: Sequence[int] | None
    groups: Sequence[UnitGroup]
    """Whether the plan cuts them or not."""
    quantization: Quantization | None = None
    """Of its weights, when it serves."""

    @cached_property
    def flow(self) -> Dataflow | None:
        """What its layers compute from; None if that cannot be found out, or there are none."""
        try:
            return trace_dataflow(self.module, layer_stack(self.module, self.plan).layers)
        except PlanError:
            return None

    @cached_property
    def table(self) -> ShardTable:
        """The plan, resolved. Raises PlanError if it cannot be carried out."""
        return resolve(
            self.module,
            self.plan,
            self.groups,
            tp=self.tp,
            pp=self.pp,
            pp_split=self.pp_split,
            flow=self.flow if self.pp > 1 else None,
            quantization=self.quantization,
        )

    def quantum(self, group: UnitGroup) -> int:
        """How many of its units are dealt together."""
        return 1 if self.quantization is None else self.quantization.quantum(group)

    @cached_property
    def weights(self) -> list[Weight]:
        """Every parameter once."""
        return [self._weight(*found) for found in parameters_of(self.module)]

    def _weight(self, name: str, aliases: tuple[str, ...], parameter: nn.Parameter, owner: nn.Module) -> Weight:
        patterns = (matching_pattern(self.plan, n) for n in (name, *aliases))
        pattern = next((p for p in patterns if p is not None), None)
        if pattern is not None and self._is_of_container(pattern, name):
            pattern = None
        style = REPLICATE if pattern is None else self.plan.styles[pattern]
        return Weight(
            name=name,
            aliases=aliases,
            shape=tuple(parameter.shape),
            num_bytes=parameter.numel() * parameter.element_size(),
            owner=owner,
            pattern=pattern,
            style=style,
            dim=cut_dimension(owner, name.rpartition(".")[2], parameter.ndim, style),
        )

    def _is_of_container(self, pattern: str, name: str) -> bool:
        """Whether an entry says only what becomes of the output of the module that a parameter is in."""
        style = self.plan.styles[pattern]
        return style.cut is Cut.NONE and acts(style) and not matches(pattern, name)

    @cached_property
    def by_name(self) -> dict[str, Weight]:
        """Parameters by every name that they have."""
        return {name: weight for weight in self.weights for name in (weight.name, *weight.aliases)}

    @cached_property
    def grouped(self) -> set[tuple[str, int]]:
        """Dimensions that belong to a group, by parameter and number."""
        return {(self.by_name[member.name].name, member.dim) for member in self.members}

    @cached_property
    def members(self) -> list[Member]:
        """Of all groups."""
        return [member for group in self.groups for member in group.members]

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """By qualified name, shared ones under each of theirs."""
        return dict(self.module.named_modules(remove_duplicate=False))

    @cached_property
    def general(self) -> dict[str, str]:
        """Names of modules and parameters as a plan would write them: layers, experts and their like as `*`."""
        found = {"": ""}
        for name, module in self.modules.items():
            kinds = {type(child) for child in module.children()}
            is_list = isinstance(module, nn.ModuleDict) and len(kinds) == 1 and len(module) > 1
            above = f"{found[name]}." if name else ""
            for child, _ in module._modules.items():
                path = f"{name}.{child}" if name else child
                found[path] = f"{above}{'*' if is_list or child.isdecimal() else child}"
            for own in module._parameters:
                found[f"{name}.{own}" if name else own] = f"{above}{own}"
        return found

    @cached_property
    def matched(self) -> dict[str, list[str]]:
        """Per pattern, the modules and parameters that it names."""
        names = [name for name in self.general if name]
        by_depth: dict[int, list[str]] = {}
        for name in names:
            by_depth.setdefault(name.count("."), []).append(name)
        return {
            pattern: [name for name in by_depth.get(pattern.count("."), ()) if matches(pattern, name)]
            for pattern in self.plan.tp
        }

    def style_of(self, module: str) -> Style:
        """What the plan does at the input and output of a module."""
        patterns = [pattern for pattern in self.plan.tp if matches(pattern, module)]
        return self.plan.styles[max(patterns, key=specificity)] if patterns else REPLICATE

    def gathers(self, weight: Weight) -> bool:
        """Whether the parts of a linear's output are put together at once."""
        return any(self.style_of(name).output is Output.GATHERED for name in self.names_of_modules(weight))

    def splits(self, weight: Weight) -> bool:
        """Whether a linear takes its part out of a whole input."""
        return any(self.style_of(name).input is Input.SPLIT for name in self.names_of_modules(weight))

    def names_of_modules(self, weight: Weight) -> list[str]:
        """Of those that hold a parameter."""
        return [name.rpartition(".")[0] for name in (weight.name, *weight.aliases)]

    def adds_up(self, module: str) -> str | None:
        """The module, this one or the nearest around it, whose output is a sum over the ranks, if there is one."""
        levels = module.split(".")
        around = (".".join(levels[:depth]) for depth in range(len(levels), 0, -1))
        return next((name for name in around if self.style_of(name).output is Output.SUMMED), None)

    def lacking(self, weight: Weight) -> str:
        """What an entry for a parameter would name: its module if that is a linear or an embedding."""
        by_module = weight.is_linear or isinstance(weight.owner, nn.Embedding)
        return self.general[weight.module if by_module else weight.name]

    @cached_property
    def typos(self) -> dict[str, str]:
        """Names that the plan lacks, to entries that match nothing and may mean them."""
        lacking = {self.lacking(weight) for weight in self.weights if weight.pattern is None}
        unmatched = [pattern for pattern, names in self.matched.items() if not names]
        alike = [(_likeness(pattern, name), pattern, name) for pattern in unmatched for name in lacking]
        found: dict[str, str] = {}
        for likeness, pattern, name in sorted(alike, reverse=True):
            if likeness > 0 and name not in found and pattern not in found.values():
                found[name] = pattern
        return found

    def guilty(self, weight: Weight) -> str:
        """The entry that decides over a parameter: its own, one that may mean it, or the one that it lacks."""
        return weight.pattern or self.typos.get(self.lacking(weight)) or self.lacking(weight)


def line(pattern: str, word: str) -> str:
    """An entry of a plan as it is pasted."""
    return f'"{pattern}": "{word}"'
