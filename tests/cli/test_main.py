from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import pytest

from shardwright.cli.errors import exit_code, message
from shardwright.cli.main import take_debug
from shardwright.cli.output import only_results_on_stdout, print_json
from shardwright.errors import ConfigError, EngineDeadError, RequestError

if TYPE_CHECKING:
    from tests.cli.conftest import FakeServer, Result

Shardwright: TypeAlias = "Callable[..., Result]"

PROGRAM = [sys.executable, "-m", "shardwright"]


def test_help_answers_without_loading_what_only_runs_need() -> None:
    code = "import sys, shardwright.cli.main as m; m.run_command(['serve', '--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "openai", "fastapi", "numpy"} & set(loaded.splitlines()[-1].split())


def test_what_foreign_code_prints_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with only_results_on_stdout():
        print("a model says hello")
        print_json({"ok": True})
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ('{"ok": true}\n', "a model says hello\n")


def test_version_and_help_are_results(shardwright: Shardwright) -> None:
    assert shardwright("--version").stdout.startswith("shardwright ")
    assert "Commands:" in shardwright().stdout
    assert "Commands:" in shardwright("bench").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["runn"], "Did you mean 'run'?; see `shardwright --help`"),
        (["run"], "Missing argument 'MODEL'; see `shardwright run --help`"),
        (["run", "m", "--tempratur", "1"], "--tempratur"),
        (["run", "m", "--max-tokens", "many", "hi"], "'--max-tokens'"),
        (["run", "m", "--dtype", "int4", "hi"], "'int4' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (["run", "m", "hi", "--kv-cache-memory-bytes", "2XB"], "'2XB' is not a size in bytes: write"),
        (["run", "m", "hi", "--top-p", "3"], "top_p is 3.0 but must be over 0 and at most 1"),
        (["run", "m", "hi", "--prompt-token-ids", "1,x"], "1,2,3"),
        (["run", "m"], "stdin holds no prompt"),
        (["run", "/no/such/model", "hi"], "/no/such/model"),
        (["serve", "m", "--port", "99999"], "port is 99999"),
        (["inspect", "/no/such/model"], "/no/such/model"),
        (["bench", "decode", "/no/such/model"], "/no/such/model"),
    ],
)
def test_wrong_use_is_exit_code_2_and_one_line(shardwright: Shardwright, arguments: list[str], says: str) -> None:
    result = shardwright(*arguments)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_text_that_is_not_utf8_is_refused(shardwright: Shardwright) -> None:
    result = shardwright("run", "m", stdin=b"abc\xff\n")
    assert (result.code, result.stderr.count("\n")) == (2, 1)
    assert "not valid UTF-8 at byte 3" in result.stderr


def test_debug_shows_the_traceback_wherever_it_stands(shardwright: Shardwright) -> None:
    for arguments in (["--debug", "run", "m", "hi", "--n", "0"], ["run", "m", "hi", "--n", "0", "--debug"]):
        result = shardwright(*arguments)
        assert result.code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: n is 0")


def test_debug_behind_two_dashes_is_a_prompt() -> None:
    assert take_debug(["run", "m", "--", "--debug"]) == (["run", "m", "--", "--debug"], False)
    assert take_debug(["run", "--debug", "m", "--", "x"]) == (["run", "m", "--", "x"], True)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (RequestError("x", param="n"), 2),
        (EngineDeadError("x"), 1),
        (MemoryError("x"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
    ],
)
def test_the_family_of_errors_becomes_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_a_message_is_one_line() -> None:
    assert message(ConfigError("two\n  lines")) == "two lines"
    assert message(ZeroDivisionError("division")).startswith("ZeroDivisionError: division (a bug in shardwright")


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = subprocess.Popen([*PROGRAM, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None
    program.stdout.close()
    _, stderr = program.communicate(timeout=60)
    assert (program.returncode, stderr) == (141, b"")


def test_ctrl_c_ends_clean(server: FakeServer) -> None:
    arguments = ["complete", "slow", "--url", server.url]
    program = subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout is not None
    assert program.stdout.read(8) == "you said"
    time.sleep(0.1)
    program.send_signal(signal.SIGINT)
    _, stderr = program.communicate(timeout=60)
    assert (program.returncode, stderr) == (130, "")
    server.wait_for_abandoned(1)
