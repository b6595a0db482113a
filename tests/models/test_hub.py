"""Snapshots from the cache, and the hub's refusals in plain words."""

from __future__ import annotations

import errno
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

from shardwright.errors import ModelSourceError
from shardwright.models import hub
from shardwright.models.resolve import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def put_into_cache(cache: Path, repo_id: str) -> Path:
    """Lay a repository out as the hub's own cache does."""
    repository = cache / ("models--" + repo_id.replace("/", "--"))
    directory = repository / "snapshots" / COMMIT
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return directory


@pytest.mark.usefixtures("offline")
def test_cached_model_is_found_offline(hub_cache: Path) -> None:
    directory = put_into_cache(hub_cache, "org/name")
    assert resolve_model("org/name") == directory


@pytest.mark.usefixtures("offline")
def test_offline_and_not_cached_names_the_cache_and_both_ways_out(hub_cache: Path) -> None:
    with pytest.raises(ModelSourceError) as caught:
        resolve_model("org/name")
    message = str(caught.value)
    assert f"org/name is not in the cache {hub_cache}" in message
    assert "unset it to download, or give a local model directory" in message


@pytest.mark.usefixtures("offline")
def test_offline_hub_is_not_reachable() -> None:
    assert not hub.is_reachable("org/name")


def test_cached_model_is_served_when_the_hub_is_unreachable(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    directory = put_into_cache(hub_cache, "org/name")
    assert resolve_model("org/name") == directory


@pytest.mark.usefixtures("hub_cache")
def test_unreachable_hub_is_a_short_error_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    assert not hub.is_reachable("org/name")
    with pytest.raises(ModelSourceError, match=r"http://127\.0\.0\.1:9 cannot be reached .*: connect to download, or"):
        resolve_model("org/name")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("status", "error_code", "message"),
    [
        (401, "GatedRepo", "org/name is gated: accept its terms at http.*, then log in"),
        (404, "RepoNotFound", "org/name is not on the hub and not a local directory"),
        (404, "RevisionNotFound", "org/name has no revision 'v9': give a branch"),
        (500, "", r"org/name, revision v9, is not in the cache .* cannot be reached \(.*500"),
    ],
)
def test_refusals_of_the_hub(fake_hub: type, status: int, error_code: str, message: str) -> None:
    fake_hub.status, fake_hub.error_code = status, error_code  # type: ignore[attr-defined]
    with pytest.raises(ModelSourceError, match=message) as caught:
        resolve_model("org/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_old_weights_are_fetched_where_there_are_no_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(repo_id: str, *, allow_patterns: list[str], **options: object) -> str:
        offered = {"org/old": "pytorch_model.bin", "org/new": "model.safetensors"}[repo_id]
        directory = tmp_path / repo_id
        directory.mkdir(parents=True, exist_ok=True)
        if any(fnmatch(offered, pattern) for pattern in allow_patterns):
            (directory / offered).touch()
        fetched.append(repo_id)
        return str(directory)

    fetched: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert (hub.snapshot("org/old") / "pytorch_model.bin").exists()
    assert (hub.snapshot("org/new") / "model.safetensors").exists()
    hub.snapshot("org/old", weights=False)
    assert fetched == ["org/old", "org/old", "org/new", "org/old"]


def test_full_disk_names_the_cache(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelSourceError, match=f"no disk space left in {hub_cache}"):
        hub.snapshot("org/name")
