"""The Hugging Face hub: snapshots of repositories in its own cache, its errors in our words."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

from shardwright.errors import ModelSourceError

WEIGHT_PATTERNS = ("*.safetensors",)
OLD_WEIGHT_PATTERNS = ("pytorch_model*.bin",)
"""Fetched from repositories that have no safetensors."""
OTHER_PATTERNS = ("*.json", "*.py", "*.jinja", "*.model", "*.tiktoken", "*.txt")
"""Config, generation config, index of shards, modeling files, chat templates and every known form of tokenizer."""


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids asking the hub."""
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def is_reachable(repo_id: str, *, timeout_s: float = 3.0) -> bool:
    """Whether the hub answers for this repository within the time; False when offline mode is on.

    A thread bounds the wait, since looking up a host's name knows no time limit.
    """
    if is_offline():
        return False
    answers: list[bool] = []

    def ask() -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        try:
            get_hf_file_metadata(hf_hub_url(repo_id, "config.json"), timeout=timeout_s)
        except Exception:  # whatever went wrong, the answer is the same
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answers)


def snapshot(repo_id: str, *, revision: str | None = None, weights: bool = True, local_dir: Path | None = None) -> Path:
    """Fetch what serving needs of a repository; what is cached and current is not fetched again.

    Args:
        repo_id: `org/name`.
        revision: branch, tag or commit; None for the main branch.
        weights: False fetches everything but the weights.
        local_dir: put the files there, not into the hub's cache.

    Returns: the directory of the snapshot.
    Raises: ModelSourceError when the repository, the revision, the permission, the network or the disk is wanting.
    """
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        try:
            return Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), local_dir=local_dir)
            )
        except Exception as exc:
            raise _translate(exc, repo_id, revision) from exc

    if not weights:
        return fetch(*OTHER_PATTERNS)
    path = fetch(*OTHER_PATTERNS, *WEIGHT_PATTERNS)
    return path if any(path.rglob("*.safetensors")) else fetch(*OTHER_PATTERNS, *OLD_WEIGHT_PATTERNS)


def _translate(exc: Exception, repo_id: str, revision: str | None) -> ModelSourceError:
    from huggingface_hub import constants, errors

    where = f"{repo_id}, revision {revision}," if revision else repo_id
    if isinstance(exc, errors.GatedRepoError):
        message = (
            f"{repo_id} is gated: accept its terms at {constants.ENDPOINT}/{repo_id}, then log in with `hf auth login` "
            "or set HF_TOKEN"
        )
    elif isinstance(exc, errors.RepositoryNotFoundError):
        message = (
            f"{repo_id} is not on the hub and not a local directory: check the spelling or, if it is private, log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    elif isinstance(exc, errors.RevisionNotFoundError):
        message = f"{repo_id} has no revision {revision!r}: give a branch, a tag or a commit of it"
    elif isinstance(exc, errors.HFValidationError):
        message = f"{repo_id!r} is neither a local directory nor a hub id of the form org/name"
    elif isinstance(exc, errors.LocalEntryNotFoundError):
        message = _not_cached(exc, where)
    elif getattr(exc, "errno", None) == errno.ENOSPC:
        message = (
            f"no disk space left in {constants.HF_HUB_CACHE} for {repo_id}: free some, or move the cache with HF_HOME"
        )
    elif isinstance(exc, errors.HfHubHTTPError):
        message = f"the hub refused {where}: {_first_line(exc)}"
    else:
        message = f"cannot fetch {where} from {constants.ENDPOINT}: {_first_line(exc)}"
    return ModelSourceError(message)


def _not_cached(exc: Exception, where: str) -> str:
    """For a snapshot that is absent or incomplete in the cache while the hub cannot be asked."""
    from huggingface_hub import constants, errors

    state = "is incomplete" if isinstance(exc, errors.IncompleteSnapshotError) else "is not"
    if is_offline():
        reason = "HF_HUB_OFFLINE is set: unset it to download"
    else:
        reason = f"{constants.ENDPOINT} cannot be reached ({_first_line(exc.__cause__ or exc)}): connect to download"
    return f"{where} {state} in the cache {constants.HF_HUB_CACHE}, and {reason}, or give a local model directory"


def _first_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[0] if lines else type(exc).__name__
