"""What sentence-transformers' files in a model directory say about making an embedding.

modules.json                       what comes after the model, in order, each with its folder
1_Pooling/config.json              which tokens make the embedding
config_sentence_transformers.json  sizes that the embedding may be cut to
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from shardwright.errors import ModelSourceError, UnsupportedModelError
from shardwright.models.task import MODULES_FILE

logger = logging.getLogger(__name__)

OPTIONS_FILE = "config_sentence_transformers.json"


class PoolingMode(StrEnum):
    """Which tokens make an embedding."""

    MEAN = "mean"
    CLS = "cls"
    """The first one."""
    LAST = "last"


MODES = {"mean": PoolingMode.MEAN, "cls": PoolingMode.CLS, "lasttoken": PoolingMode.LAST}
"""By their names in newer files."""

OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""By their switches in older ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SentenceConfig:
    """How a directory wants its embeddings made."""

    modes: tuple[str, ...] | None = None
    """Ways of pooling in the files' words, one after another in the embedding; None: the files name none."""
    tail: list[tuple[str, Path]] = field(default_factory=list)
    """What comes after pooling: Dense or Normalize, with its folder."""
    truncate_dim: int | None = None
    """Numbers of an embedding that are used."""
    dimensions: list[int] | None = None
    """Sizes that embeddings may be cut to; empty: any; None: the files do not say that they may be cut."""

    @property
    def mode(self) -> PoolingMode | None:
        """The way of pooling. Raises UnsupportedModelError if it is one that is not served, or several at once."""
        if self.modes is None:
            return None
        if len(self.modes) != 1 or self.modes[0] not in MODES:
            raise UnsupportedModelError(
                f"the model pools by {' and '.join(self.modes)}, but what is served is one of {', '.join(MODES)}: "
                "choose another with --pooling if that makes sense for the model"
            )
        return MODES[self.modes[0]]


def read_sentence_config(path: Path) -> SentenceConfig | None:
    """Read a directory's files; None if sentence-transformers left none there.

    Raises: ModelSourceError if one cannot be read; UnsupportedModelError if embeddings take more than pooling, dense
        layers and normalising.
    """
    if not (path / MODULES_FILE).is_file():
        return None
    try:
        modules = [(str(m["type"]).rpartition(".")[2], path / m["path"]) for m in _read(path / MODULES_FILE, list)]
    except (KeyError, TypeError) as exc:
        raise ModelSourceError(f"{path / MODULES_FILE} does not give each module a type and a path: {exc!r}") from exc
    kinds = [kind for kind, _ in modules]
    if kinds[:1] != ["Transformer"] or set(kinds[1:]) - {"Pooling", "Dense", "Normalize", "Dropout"}:
        raise UnsupportedModelError(
            f"{path / MODULES_FILE} asks for {', '.join(kinds)}: what is served is a Transformer, followed by Pooling, "
            "Dense and Normalize"
        )
    options = _read(path / OPTIONS_FILE, dict, missing={})
    if prompt := (options.get("prompts") or {}).get(options.get("default_prompt_name")):
        logger.warning("%s: texts shall begin with %r, which is not put before them: do it yourself", path, prompt)
    pooling = next((_read(folder / "config.json", dict) for kind, folder in modules if kind == "Pooling"), None)
    truncate_dim = options.get("truncate_dim")
    return SentenceConfig(
        modes=None if pooling is None else _modes(pooling),
        tail=[(kind, folder) for kind, folder in modules if kind in ("Dense", "Normalize")],
        truncate_dim=truncate_dim,
        dimensions=[] if truncate_dim is not None else nested_dimensions(options),
    )


def nested_dimensions(options: dict[str, Any]) -> list[int] | None:
    """Sizes that a config says its embeddings may be cut to (Matryoshka embeddings), as in SentenceConfig."""
    if sizes := options.get("matryoshka_dimensions"):
        return sorted(int(size) for size in sizes)
    return [] if options.get("is_matryoshka") else None


def _modes(pooling: dict[str, Any]) -> tuple[str, ...]:
    named = pooling.get("pooling_mode")
    if named is None:
        return tuple(mode for switch, mode in OLD_MODES.items() if pooling.get(switch)) or ("mean",)
    return (named,) if isinstance(named, str) else tuple(named)


def _read(file: Path, kind: type, *, missing: Any = None) -> Any:
    """The JSON value of a file; `missing` if there is no such file and it may be absent."""
    if missing is not None and not file.is_file():
        return missing
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelSourceError(f"cannot read {file}: {exc}") from exc
    if not isinstance(value, kind):
        raise ModelSourceError(f"{file} holds no JSON {'object' if kind is dict else 'list'}")
    return value
