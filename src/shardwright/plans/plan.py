"""A parallel plan as a value, and where one comes from: the model's own code and config, or a file.

Patterns name modules or parameters of the whole model, `*` for one level, and map them to styles; pipeline entries name
modules in the order in which they run, with what they take and give. Both are in the form that Transformers uses.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from shardwright.errors import PlanError
from shardwright.plans.document import read_document
from shardwright.plans.patterns import matches
from shardwright.plans.styles import Style, parse_style

Source = Literal["model", "config", "file", "argument", "inferred", "none"]


@dataclass(frozen=True, slots=True)
class PipelineEntry:
    """What a module of the pipeline takes from the one before it, and what it gives."""

    inputs: tuple[str, ...]
    """Names of arguments of its forward."""
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Which parameters are cut, and how, and which modules follow each other.

    Raises: PlanError if a style is unknown.
    """

    tp: Mapping[str, str] = field(default_factory=dict)
    """Pattern to the word of its style, as its author wrote it."""
    pp: Mapping[str, PipelineEntry] = field(default_factory=dict)
    """Qualified name to entry, in order; exactly one of them usually holds the layers."""
    no_split: frozenset[str] = frozenset()
    """Names of classes whose instances stay on one stage."""
    tp_source: Source = "none"
    pp_source: Source = "none"

    def __post_init__(self) -> None:
        for pattern, word in self.tp.items():
            parse_style(word, where=f"plan entry {pattern!r}")

    @cached_property
    def styles(self) -> dict[str, Style]:
        """Pattern to style."""
        return {pattern: parse_style(word, where=pattern) for pattern, word in self.tp.items()}

    def as_document(self) -> dict[str, Any]:
        """Plain data, as `--tp-plan` and `--pp-plan` read it."""
        return {
            "tp_plan": dict(self.tp),
            "pp_plan": {name: [list(entry.inputs), list(entry.outputs)] for name, entry in self.pp.items()},
            "no_split": sorted(self.no_split),
        }


def plan_of(module: nn.Module, *, expert_parallel: bool = False) -> ParallelPlan:
    """The plan that a model carries: entries on its modules, over those on its config.

    Args:
        module: a model, on "meta" or not.
        expert_parallel: deal out whole experts where the model has a plan for it (`_ep_plan`).

    Raises: PlanError if it has an unknown style or is of the wrong type.
    """
    tp, tp_source = _carried(module, "tp_plan")
    if expert_parallel:
        experts, source = _carried(module, "ep_plan")
        kept = {p: w for p, w in tp.items() if not any(p == e or p.startswith(f"{e}.") for e in experts)}
        tp, tp_source = kept | experts, tp_source if tp else source
    pp, pp_source = _carried(module, "pp_plan")
    no_split = getattr(module, "_no_split_modules", None) or ()
    return ParallelPlan(
        tp=parse_tp(tp, where="the model's tp_plan"),
        pp=parse_pp(pp, where="the model's pp_plan"),
        no_split=frozenset(str(name) for name in no_split),
        tp_source=tp_source,
        pp_source=pp_source,
    )


def with_overrides(plan: ParallelPlan, *, tp: ParallelPlan | None, pp: ParallelPlan | None) -> ParallelPlan:
    """A plan whose tensor or pipeline part is replaced by another's."""
    if tp is not None:
        plan = replace(plan, tp=tp.tp, tp_source=tp.tp_source)
    if pp is not None:
        plan = replace(plan, pp=pp.pp, pp_source=pp.pp_source, no_split=pp.no_split or plan.no_split)
    return plan


def read_plan(path: str | Path, *, module: nn.Module | None = None) -> ParallelPlan:
    """Read a plan from a JSON or YAML file.

    The file holds `tp_plan`, `pp_plan` and `no_split`, or one of the first two alone without its name. Plans under
    `base_model_tp_plan` and `base_model_pp_plan`, as in a config, are relative to the base model.

    Args:
        path: of the file.
        module: the model, whose base is looked for; without one, such plans are relative to the whole.

    Raises: PlanError saying what is wrong, and where.
    """
    path = Path(path)
    return parse_plan(read_document(path), where=f"plan file {path}", source="file", module=module)


PARTS = ("tp_plan", "pp_plan")
KEYS = (*PARTS, *(f"base_model_{part}" for part in PARTS), "no_split")
"""What a plan's document may hold."""


def parse_plan(document: Any, *, where: str, source: Source, module: nn.Module | None = None) -> ParallelPlan:
    """A plan from plain data; see `read_plan`. An empty part counts: it says that nothing is cut. Raises PlanError."""
    if not isinstance(document, Mapping):
        raise PlanError(f"{where}: a plan is a mapping of patterns to styles, not {_kind(document)}")
    if not document:
        raise PlanError(f"{where} is empty: it needs a tp_plan, patterns to styles, or a pp_plan")
    if not any(key in document for key in KEYS):
        bare_tp = any(isinstance(value, str) for value in document.values())
        document = {"tp_plan" if bare_tp else "pp_plan": document}
    if unknown := [key for key in document if key not in KEYS]:
        raise PlanError(f"{where}: unknown key {_shown(unknown[0])}; known are {', '.join(KEYS)}")
    parts: dict[str, dict[Any, Any]] = {}
    for name in PARTS:
        for key in (f"base_model_{name}", name):
            value = document.get(key)
            if value is None:
                continue
            if not isinstance(value, Mapping):
                raise PlanError(f"{where}: {key} must be a mapping, not {_kind(value)}")
            if key != name and module is not None and all(isinstance(entry, str) for entry in value):
                value = _with_prefix(value, base_prefix(module, value))
            parts[name] = parts.get(name, {}) | dict(value)
    no_split = document.get("no_split") or ()
    if not isinstance(no_split, list | tuple) or not all(isinstance(name, str) for name in no_split):
        raise PlanError(f"{where}: no_split must be a list of class names, not {_kind(no_split)}")
    return ParallelPlan(
        tp=parse_tp(parts.get("tp_plan", {}), where=where),
        pp=parse_pp(parts.get("pp_plan", {}), where=where),
        no_split=frozenset(no_split),
        tp_source=source if "tp_plan" in parts else "none",
        pp_source=source if "pp_plan" in parts else "none",
    )


def parse_tp(entries: Mapping[Any, Any], *, where: str) -> dict[str, str]:
    """Patterns to words, checked. Raises PlanError."""
    for pattern, word in entries.items():
        if not isinstance(pattern, str) or not pattern or any(not level for level in pattern.split(".")):
            raise PlanError(f"{where}: {_shown(pattern)} is no pattern: levels of a module's name, `*` for any one")
        if not isinstance(word, str):
            raise PlanError(f"{where}: {pattern!r} must name a style such as 'colwise', not {_kind(word)}")
        parse_style(word, where=f"{where}: {pattern!r}")
    return dict(entries)


def parse_pp(entries: Mapping[Any, Any], *, where: str) -> dict[str, PipelineEntry]:
    """Names to entries, checked. Raises PlanError."""
    return {name: _pipeline_entry(name, entry, where=where) for name, entry in entries.items()}


def _pipeline_entry(name: Any, entry: Any, *, where: str) -> PipelineEntry:
    if isinstance(entry, PipelineEntry):
        return entry
    form = "two lists of names, its inputs and its outputs: [[hidden_states], [hidden_states]]"
    if not isinstance(name, str) or not isinstance(entry, list | tuple) or len(entry) != 2:
        raise PlanError(f"{where}: pipeline entry {_shown(name)} must have {form}")
    sides = []
    for side in entry:
        names = (side,) if isinstance(side, str) else side
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise PlanError(f"{where}: pipeline entry {name!r} must have {form}")
        sides.append(tuple(names))
    return PipelineEntry(*sides)


def base_prefix(module: nn.Module, names: Iterable[str]) -> str:
    """Name of the part of a model that the plans of its config speak of.

    Args:
        module: the model.
        names: patterns or names of the plan.

    Returns: that of the first module that has the text config and in which any of the names is found; empty for the
        model itself.
    """
    config = _text_config(module)
    base = getattr(module, "base_model_prefix", "")
    candidates = [base] if base and isinstance(getattr(module, base, None), nn.Module) else []
    candidates += [n for n, m in module.named_modules() if config is not None and getattr(m, "config", None) is config]
    wanted = [name for name in names if isinstance(name, str)]
    for candidate in candidates:
        below = [name for name, _ in module.get_submodule(candidate).named_modules()]
        if any(matches(pattern, name) for pattern in wanted for name in below):
            return candidate
    return candidates[0] if candidates else ""


def _with_prefix(entries: Mapping[Any, Any], prefix: str) -> dict[Any, Any]:
    return {f"{prefix}.{name}" if prefix else name: value for name, value in entries.items()}


def _text_config(module: nn.Module) -> Any:
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _carried(module: nn.Module, kind: str) -> tuple[dict[str, Any], Source]:
    """Entries of a kind of plan on the modules of a model and on its config, names relative to the model."""
    of_base = _mapping(_text_config(module), f"base_model_{kind}", "config")
    on_config = _with_prefix(of_base, base_prefix(module, of_base)) if of_base else {}
    by_class: dict[str, Any] = {}
    by_instance: dict[str, Any] = {}
    for path, owner in reversed(list(module.named_modules())):  # what stands nearer to the root overrides
        where = f"{path}." if path else ""
        for name, value in _mapping(type(owner), f"_{kind}", type(owner).__name__).items():
            by_class[f"{where}{name}"] = value
        for name, value in _mapping(owner, f"_{kind}", type(owner).__name__).items():
            # Transformers copies the config's onto the base, which it sometimes takes the whole model for
            copied = on_config.get(f"{where}{name}") == value or (not path and of_base.get(name) == value)
            if not copied:
                by_instance[f"{where}{name}"] = value
    on_modules = by_class | by_instance
    source: Source = "config" if on_config else ("model" if on_modules else "none")
    return on_config | on_modules, source


def _mapping(owner: Any, name: str, where: str) -> Mapping[Any, Any]:
    value = getattr(owner, name, None)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise PlanError(f"{where}.{name} must be a mapping, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({_shown(value)})"


def _shown(value: Any) -> str:
    """A value of any kind in bearable length."""
    return reprlib.repr(value)
