"""From what the user typed to a directory with the model's files.

`MODEL` is a directory, the starter's name, or a hub id. What has no directory (`package.module:factory`, a registered
name) is only told apart here; see models/custom.py. GGUF files are not covered yet and say so.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

from shardwright.config import ModelConfig
from shardwright.errors import ModelSourceError
from shardwright.models.registry import registered, registered_names
from shardwright.models.starter import STARTER_NAME, starter_directory

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
CONFIG_FILE = "config.json"
FACTORY_FILE = "factory.py"


def is_reference(name: str) -> bool:
    """Whether a name has the form `package.module:factory`."""
    return _REFERENCE.fullmatch(name) is not None


def has_factory(directory: Path) -> bool:
    """Whether a directory's model is made by its factory.py: its config.json, if any, is not one of Transformers."""
    if not (directory / FACTORY_FILE).is_file():
        return False
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return True
    return not (isinstance(config, dict) and (config.get("model_type") or config.get("auto_map")))


def resolve_model(model: str, *, revision: str | None = None) -> Path:
    """The directory that holds the model's config, weights and tokenizer, fetched if need be.

    Args:
        model: a directory, `smollm2-135m`, or a hub id such as `org/name`.
        revision: branch, tag or commit of a hub model; ignored for directories.

    Raises: ModelSourceError if there is no such model or its files cannot be had.
    """
    directory = resolve_directory(model, revision=revision)
    try:
        if not (directory / CONFIG_FILE).is_file() and not (directory / FACTORY_FILE).is_file():
            raise ModelSourceError(_no_config(directory))
    except OSError as exc:
        raise ModelSourceError(f"cannot read {directory}: {exc.strerror}") from exc
    return directory


def uses_factory(model: ModelConfig) -> bool:
    """Whether the model is made by a function: registered, `package.module:function`, or in its directory's factory.py.

    Raises: ModelSourceError as `resolve_model` does.
    """
    return has_no_directory(model) or has_factory(resolve_model(model.model, revision=model.revision))


def has_no_directory(model: ModelConfig) -> bool:
    """Whether the model is named in Python: registered, or `package.module:function`."""
    is_named = is_reference(model.model) and not Path(model.model).exists()
    return registered(model.model) is not None or is_named


def home_directory(model: ModelConfig) -> Path | None:
    """The directory with a model's tokenizer and generation config; None for code without weights beside it.

    Raises: ModelSourceError as `resolve_model` does.
    """
    if not has_no_directory(model):
        return resolve_model(model.model, revision=model.revision)
    registration = registered(model.model)
    weights = model.weights or (None if registration is None else registration.weights)
    if weights is None:
        return None
    path = Path(weights).expanduser().resolve()
    return path if path.is_dir() else path.parent


def resolve_directory(name: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """As `resolve_model`, for directories that need no config.json: a tokenizer's, say.

    Args:
        weights: False leaves the weights of a hub repository where they are.
    """
    path = Path(name).expanduser()
    if _is_directory(path):
        return path.resolve()
    if name == STARTER_NAME:
        return starter_directory()
    _refuse_what_is_no_directory(name, path)
    if not _HUB_ID.fullmatch(name):
        raise ModelSourceError(_no_such_model(name, path))
    from shardwright.models.hub import snapshot

    try:
        return snapshot(name, revision=revision, weights=weights)
    except ModelSourceError as exc:
        if near := _near_names(path):
            raise ModelSourceError(f"{exc}; as a directory: did you mean {near}?") from exc
        raise


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as exc:  # a parent that may not be entered, a name too long
        raise ModelSourceError(f"cannot read {path}: {exc.strerror}") from exc


def _refuse_what_is_no_directory(name: str, path: Path) -> None:
    """Raise for the forms of MODEL that are known but cannot be served from."""
    if name.endswith(".gguf"):
        raise ModelSourceError(
            f"{name} is a GGUF file, which shardwright does not read yet: give a directory with config.json and "
            "safetensors, or a hub id"
        )
    if path.is_file():
        raise ModelSourceError(f"{name} is a file: give the directory it lies in, {path.parent}")
    if is_reference(name):
        raise ModelSourceError(f"{name} names a function, but a directory or a hub id is needed here")


def _no_config(directory: Path) -> str:
    found = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if found:
        return f"{directory} has no {CONFIG_FILE}, but its folder {found[-1]} has: give {directory / found[-1]}"
    holds = ", ".join(sorted(path.name for path in directory.iterdir())[:5]) or "nothing"
    return (
        f"{directory} has no {CONFIG_FILE}; it holds {holds}: a model directory has {CONFIG_FILE}, *.safetensors and "
        f"the tokenizer's files, as save_pretrained writes them, or a {FACTORY_FILE} that makes the model"
    )


def _no_such_model(name: str, path: Path) -> str:
    is_path = path.is_absolute() or "/" in name or name.startswith((".", "~"))
    lead = f"{name} does not exist" if is_path else f"there is no model {name!r}"
    near = _near_names(path)
    if near:
        return f"{lead}: did you mean {near}?"
    return f"{lead}: give a directory, a hub id such as org/name, or {STARTER_NAME}"


def _near_names(path: Path) -> str | None:
    """A directory beside `path`, or the starter, spelled nearly the same."""
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        beside = []
    names = {name.lower(): str(path.with_name(name)) for name in beside}
    if len(path.parts) == 1:
        names |= {name.lower(): name for name in (STARTER_NAME, *registered_names())}
    near = difflib.get_close_matches(path.name.lower(), names, n=1)
    return names[near[0]] if near else None
