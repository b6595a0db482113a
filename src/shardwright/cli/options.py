"""Flags derived from records: a field of a config is a flag, its metadata the help, its default the default.

`with_flags(engine=ENGINE_FLAGS)` gives a command one option per field and hands it what the user chose as one dict,
`engine`, ready to be keyword arguments. Not covered: what the values mean; the records check themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
import typer

from shardwright.config import EngineConfig, engine_options, parse_bytes
from shardwright.sampling_params import SamplingParams

SHORT = {"tensor_parallel_size": "-tp", "pipeline_parallel_size": "-pp", "data_parallel_size": "-dp"}
"""Flags with a second, short name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One option of a command."""

    name: str
    """As the field: words with underscores."""
    type: Any
    """What typer understands: a class, a Literal, a list of a class, or one of them or None."""
    default: Any
    help: str
    section: str | None = None
    """Of the command's help; None: that of the flags it came with."""

    def parameter(self, section: str) -> inspect.Parameter:
        """The keyword argument that typer turns into `--name` (`--name/--no-name` for a bool).

        Args:
            section: of the command's help, if the flag has none of its own.
        """
        spelled = "--" + self.name.replace("_", "-")
        more: dict[str, Any] = {}
        if self.type in (bool, bool | None):
            spelled += "/--no-" + self.name.replace("_", "-")
            more = {"show_default": bool(self.default)}
        if self.name.endswith("_bytes"):
            more = {"parser": parse_bytes, "metavar": "SIZE"}
        names = [spelled, SHORT[self.name]] if self.name in SHORT else [spelled]
        info = typer.Option(*names, help=self.help, rich_help_panel=f"{self.section or section} options", **more)
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, kind, default=self.default, annotation=Annotated[self.type, info])


def simplify(annotation: Any) -> Any:
    """A field's type as typer takes it: of `str | list[str] | None`, the list; tuples of one type as lists."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [simplify(member) for member in get_args(annotation)]
        lists = [member for member in members if get_origin(member) is list]
        return lists[0] | None if lists else annotation
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]]  # type: ignore[misc]  # typer reads the type at run time
    return annotation


def record_flags(record: type[Any], *, section: str | None = None) -> list[Flag]:
    """One flag for each field of a dataclass that was made with `config.option`."""
    hints = get_type_hints(record)
    return [
        Flag(name=f.name, type=simplify(hints[f.name]), default=f.default, help=f.metadata["help"], section=section)
        for f in dataclasses.fields(record)
        if "help" in f.metadata
    ]


def engine_flags(*, only: Collection[str] | None = None) -> list[Flag]:
    """The engine's options, in the order of its records, each of which is a section of the help; all, or those that a
    command has a use for.
    """
    parts = dict.fromkeys(part for part, _ in engine_options())
    records = get_type_hints(EngineConfig)
    flags = [flag for part in parts for flag in record_flags(records[part], section=part.capitalize())]
    return [flag for flag in flags if only is None or flag.name in only]


def sampling_flags(**defaults: Any) -> list[Flag]:
    """The fields of SamplingParams, helped by its docstring; `defaults` are the command's own.

    What cannot be typed is left to Python: maps, and None where that means something.
    """
    documented = re.sub(r"; None is .+\.$", ".", SamplingParams.__doc__ or "", flags=re.MULTILINE)
    helps = dict(re.findall(r"^ +(\w+): (.+)$", documented, flags=re.MULTILINE))
    return [
        Flag(
            name=f.name,
            type=simplify(f.type),
            default=defaults.get(f.name, f.default),
            help=helps[f.name][:1].upper() + helps[f.name][1:],
        )
        for f in msgspec.structs.fields(SamplingParams)
        if "dict" not in str(f.type)
    ]


def with_flags(**groups: Iterable[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of each group; its keyword argument of the group's name gets {flag name: value}.

    The dict leaves out what is None or empty: the record's own default says what that means. A name that two groups
    have belongs to the first.
    """
    taken: set[str] = set()
    flags: dict[str, Sequence[Flag]] = {}
    for group, members in groups.items():
        flags[group] = [flag for flag in members if flag.name not in taken]
        taken |= {flag.name for flag in flags[group]}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in flags]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            for group, members in flags.items():
                given = {flag.name: values.pop(flag.name) for flag in members}
                values[group] = {name: value for name, value in given.items() if value is not None and value != []}
            command(**values)

        added = [flag.parameter(group.capitalize()) for group, members in flags.items() for flag in members]
        wrapper.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]  # read by inspect
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        return wrapper

    return decorate


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A directory, a hub id, package.module:factory, or smollm2-135m, the starter."
    ),
]
