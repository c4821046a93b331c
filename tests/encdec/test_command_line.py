"""How every command ends: a mistake is one paragraph and 78, Ctrl-C one line and 130, a reader that has gone 141."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from encdec import sanity_check
from encdec.checkpoints import __main__ as checkpoints
from encdec.command_line import exit_code_of
from encdec.errors import CheckpointError
from launchers import job, submit
from tests.conftest import REPOSITORY

Main = Callable[[list[str]], int]

# command -> (its main, arguments that are wrong, words of the message)
MISTAKES: dict[str, tuple[Main, list[str], tuple[str, ...]]] = {
    "launchers.submit": (submit.main, ["--phase", "medum"], ("'medum'", "Did you mean medium?")),
    "launchers.job": (job.main, [], ("run_dir", "python -m launchers.job --help")),
    "encdec.checkpoints": (checkpoints.main, ["lst"], ("'lst'", "Did you mean list?")),
    "encdec.checkpoints list": (checkpoints.main, ["list"], ("path", "python -m encdec.checkpoints list --help")),
    "encdec.checkpoints prune": (
        checkpoints.main,
        ["prune", "."],
        ("--keep", "python -m encdec.checkpoints prune --help"),
    ),
    "encdec.checkpoints average": (
        checkpoints.main,
        ["average", ".", "out", "--last", "1"],
        ("--last", "a whole number from 2 up", "'1'"),
    ),
    "encdec.checkpoints export": (checkpoints.main, ["export", ".", "out", "--dtype", "fp8"], ("'fp8'", "fp32")),
    "encdec.sanity_check": (sanity_check.main, [], ("--model-path", "python -m encdec.sanity_check --help")),
    "encdec.sanity_check device": (
        sanity_check.main,
        ["--model-path", "x", "--device", "abacus"],
        ("torch device of this machine", "'abacus'", "--device cpu"),
    ),
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistake_in_the_arguments_is_one_paragraph(command: str, capsys: pytest.CaptureFixture[str]):
    main, arguments, words = MISTAKES[command]
    assert main(arguments) == 78
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err


def test_error_meant_for_a_user_ends_with_its_own_code(capsys: pytest.CaptureFixture[str]):
    def fail() -> int:
        raise CheckpointError("It must hold", found="not", remedy="Mend it")

    assert exit_code_of(fail) == 1
    assert capsys.readouterr().err == "error: It must hold, found not. Mend it.\n"


def test_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert exit_code_of(lambda: signal.raise_signal(signal.SIGINT) or 0) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_closed_output_is_no_error(tmp_path: Path):
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "encdec.checkpoints", "list", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_reader_that_has_gone_is_no_error(tmp_path: Path):
    command = [sys.executable, "-m", "encdec.checkpoints", "list", "--json", str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
