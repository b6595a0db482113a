"""Files of plans as plain data: JSON or YAML, in which nothing is lost or guessed."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from shardwright.errors import PlanError

MAX_BYTES = 10_000_000
"""A larger file is no plan."""


def read_document(path: Path) -> Any:
    """What a JSON or YAML file holds.

    Raises: PlanError if it cannot be read, is neither, says a key twice, or holds itself.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PlanError(f"plan file {path} has over {MAX_BYTES:,} bytes: is it a plan?")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise PlanError(f"plan file {path} cannot be read: {exc}") from exc
    return parse_text(text, is_json=path.suffix == ".json", where=f"plan file {path}")


def parse_text(text: str, *, is_json: bool, where: str) -> Any:
    """What a JSON or YAML text holds. Raises PlanError as `read_document` does."""
    try:
        if is_json:
            return json.loads(text, object_pairs_hook=_unique)
        return yaml.load(text, Loader=_Loader)
    except PlanError as exc:
        raise PlanError(f"{where}: {exc}") from exc
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as exc:
        said = " ".join(str(exc).split())  # PyYAML raises any of them for a scalar that is not what its tag says
        raise PlanError(f"{where} is no {'JSON' if is_json else 'YAML'}: {said or type(exc).__name__}") from exc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise PlanError(f"the key {key!r} stands there twice: leave one of them")
        document[key] = value
    return document


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # the library is not typed
    """Reads mappings whose keys differ, and no references: what refers to itself has no end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise PlanError(f"line {event.start_mark.line + 1} refers to *{event.anchor}: write out what it stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Hashable] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable):
                if name in seen:
                    line = key.start_mark.line + 1
                    raise PlanError(f"the key {name!r} stands there twice, again in line {line}: leave one of them")
                seen.add(name)
        return super().construct_mapping(node, deep)
