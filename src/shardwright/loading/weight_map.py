r"""A user's map from the names in a checkpoint to those in the module: renamings, and tensors to be joined.

    {"rename": {"^transformer\\.h\\.": "layers.",            regex: replacement, all of them in order on every name
                "\\.bias_mask$": null},                      null leaves the tensor out
     "merge":  {"qkv.weight": ["q.weight", "k.weight", "v.weight"],            joined along dimension 0
                "up.weight": {"from": ["a.weight", "b.weight"], "dim": 1}}}    or another

Renaming comes first. Names in `merge` are endings: they hold in every layer that has them. A file with nothing to merge
may be the renamings alone: a mapping, or a list of [regex, replacement]. JSON or YAML.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

DEFAULT_FILES = ("rename.json", "rename.yaml", "rename.yml")
"""Looked for beside the weights."""

NAMES_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Merge:
    """Tensors that become one."""

    target: str
    """End of its name."""
    sources: tuple[str, ...]
    """Ends of theirs, in order."""
    dim: int


@dataclass(frozen=True, slots=True)
class Merged:
    """Pieces that lie apart in the checkpoint, joined when they are read."""

    name: str
    pieces: tuple[Any, ...]
    dim: int

    def __getitem__(self, index: Any) -> Tensor:
        pieces = [piece[...] for piece in self.pieces]
        try:
            return torch.cat(pieces, self.dim)[index]
        except (RuntimeError, IndexError) as exc:
            raise self.misfit([tuple(piece.shape) for piece in pieces]) from exc

    def misfit(self, shapes: Sequence[tuple[int, ...]]) -> CheckpointError:
        """The error for pieces of these shapes."""
        found = ", ".join(map(str, shapes))
        return CheckpointError(f"{self.name} cannot be joined of {found} along dimension {self.dim}")


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Rules, and the file they come from."""

    file: Path
    rename: tuple[tuple[re.Pattern[str], str | None], ...]
    merge: tuple[Merge, ...]

    def apply(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors under their new names.

        Raises: CheckpointError if a rule does nothing, two tensors get one name, or one to be joined is missing.
        """
        renamed: dict[str, Any] = {}
        source_of: dict[str, str] = {}
        used = set()
        for name, tensor in tensors.items():
            new: str | None = name
            for pattern, replacement in self.rename:
                if new is not None and pattern.search(new):
                    used.add(pattern)
                    new = self._replace(pattern, replacement, new)
            if new is None:
                continue
            if new in renamed:
                raise CheckpointError(f"{self.file} gives both {source_of[new]} and {name} the name {new}")
            renamed[new], source_of[new] = tensor, name
        if idle := [pattern.pattern for pattern, _ in self.rename if pattern not in used]:
            raise CheckpointError(
                f"{self.file}: no weight matches {idle[0]!r}; the checkpoint has {_some(list(tensors))}"
            )
        for merge in self.merge:
            self._join(merge, renamed)
        logger.info("%s: %d weights of the checkpoint become %d", self.file, len(tensors), len(renamed))
        return renamed

    def _replace(self, pattern: re.Pattern[str], replacement: str | None, name: str) -> str | None:
        if replacement is None:
            return None
        try:
            return pattern.sub(replacement, name)
        except (re.error, IndexError) as exc:
            raise ConfigError(f"{self.file}: the replacement {replacement!r} of {pattern.pattern!r}: {exc}") from exc

    def _join(self, merge: Merge, tensors: dict[str, Any]) -> None:
        """Replace, in every layer that has them, the sources by their target."""
        stems = {name.removesuffix(end) for end in merge.sources for name in tensors if _ends_with(name, end)}
        if not stems:
            raise CheckpointError(
                f"{self.file}: no weight is named {merge.sources[0]} or ends in .{merge.sources[0]}; "
                f"the checkpoint has {_some(list(tensors))}"
            )
        for stem in sorted(stems):
            names = [stem + end for end in merge.sources]
            target = stem + merge.target
            if missing := [name for name in names if name not in tensors]:
                raise CheckpointError(
                    f"{self.file}: {target} is to be joined of {missing[0]} too, which the checkpoint lacks"
                )
            if target in tensors and target not in names:
                raise CheckpointError(f"{self.file}: {target} is to be joined, but the checkpoint has it already")
            tensors[target] = Merged(target, tuple(tensors.pop(name) for name in names), merge.dim)


def find_weight_map(checkpoint: Path, file: str | Path | None = None) -> WeightMap | None:
    """The map to use for a checkpoint: the file given, else the one beside the weights, if there is one.

    Raises: ConfigError if it cannot be read or understood.
    """
    if file is not None:
        return read_weight_map(Path(file).expanduser())
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    found = next((directory / name for name in DEFAULT_FILES if (directory / name).is_file()), None)
    return None if found is None else read_weight_map(found)


def read_weight_map(file: Path) -> WeightMap:
    """Read a map. Raises: ConfigError if it cannot be read, or has an unknown key, a bad regex or a bad value."""
    content = _read(file)
    is_plain = (
        content and isinstance(content, Mapping) and all(v is None or isinstance(v, str) for v in content.values())
    )
    if is_plain or isinstance(content, list):
        content = {"rename": content}
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"{file} is no weight map: write {{regex: replacement}}, or rename and merge with such maps")
    if unknown := [key for key in content if key not in ("rename", "merge")]:
        raise ConfigError(f"{file} has the unknown key {unknown[0]!r}: there are rename and merge")
    rename = tuple(_rename_rule(pair, file) for pair in _pairs(content.get("rename"), file))
    merge = content.get("merge") or {}
    if not isinstance(merge, Mapping):
        raise ConfigError(f"{file}: merge is a {type(merge).__name__} but must map a name to the names it is made of")
    return WeightMap(file, rename, tuple(_merge_rule(target, spec, file) for target, spec in merge.items()))


def _read(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            return json.loads(text)
        import yaml  # type: ignore[import-untyped]

        return yaml.safe_load(text)
    except Exception as exc:  # of the file system, of either parser
        raise ConfigError(f"cannot read the weight map {file}: {' '.join(str(exc).split())}") from exc


def _pairs(rename: Any, file: Path) -> list[Any]:
    if rename is None:
        return []
    if isinstance(rename, Mapping):
        return list(rename.items())
    if isinstance(rename, list):
        return [pair for item in rename for pair in (item.items() if isinstance(item, Mapping) else [item])]
    raise ConfigError(f"{file}: rename is a {type(rename).__name__} but must map a regex to its replacement")


def _rename_rule(pair: Any, file: Path) -> tuple[re.Pattern[str], str | None]:
    is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
    if not is_pair or not isinstance(pair[0], str) or not (pair[1] is None or isinstance(pair[1], str)):
        raise ConfigError(
            f"{file}: {pair!r} is no renaming: write [regex, replacement], or null in its place to leave it out"
        )
    try:
        return re.compile(pair[0]), pair[1]
    except re.error as exc:
        raise ConfigError(f"{file}: {pair[0]!r} is no regex: {exc}") from exc


def _merge_rule(target: Any, spec: Any, file: Path) -> Merge:
    sources, dim, unknown = spec, 0, []
    if isinstance(spec, Mapping):
        sources, dim = spec.get("from"), spec.get("dim", 0)
        unknown = [key for key in spec if key not in ("from", "dim")]
    are_names = isinstance(sources, list) and len(sources) > 1 and all(isinstance(name, str) for name in sources)
    if unknown or not are_names or not isinstance(dim, int) or not isinstance(target, str):
        raise ConfigError(
            f'{file}: {target!r} is merged from {spec!r}: write a list of names, or {{"from": [names], "dim": number}}'
        )
    assert isinstance(sources, list)
    return Merge(target, tuple(sources), dim)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (" and more" if len(names) > NAMES_SHOWN else "")
