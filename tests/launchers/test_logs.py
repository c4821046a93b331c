"""Which log is shown, and which error comes first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from encdec.files import RunPaths
from launchers.logs import main
from launchers.views import log_following
from launchers.views.log_files import error_lines, last_lines
from tests.conftest import REPOSITORY, wait_until
from tests.launchers.conftest import Play, Story

TRACEBACK = """2026-11-21 09:39:31,341 INFO step 9/60
[rank1]: Traceback (most recent call last):
[rank1]:   File "/run/code/encdec/training/trainer.py", line 80, in train
[rank1]:     loss = self.step(batch)
[rank1]:   File "/run/code/encdec/training/trainer.py", line 99, in step
[rank1]:     raise RuntimeError("no memory")
[rank1]: RuntimeError: no memory
[rank1]: Traceback (most recent call last):
[rank1]:   File "/lib/python3.11/threading.py", line 1, in end
[rank1]: ConnectionResetError: by peer
terminate called without an active exception
"""


def show(runs: Path, *flags: str) -> int:
    return main(["medium-1", "--root", str(runs), *flags])


@pytest.fixture
def crashed(story: Story) -> Story:
    """Two nodes of one rank; rank 1 raised, rank 0 lost its connection; started again, then killed."""
    story.attempt("12", steps=range(1, 10))
    first = story.log("rank-1.restart-0.err", TRACEBACK, node=1)
    late = story.log("rank-0.restart-0.err", "one\nTraceback (most recent call last):\n  at\nOSError: closed\n")
    os.utime(first, (1000, 1000))
    os.utime(late, (1001, 1001))
    for node, rank in ((0, 0), (1, 1)):  # the agents' own words, the effect's before the cause's
        log = f"/moved/since/logs/node-{node}/rank-{rank}.restart-0.err"
        story.tell("rank_failed", node=node, detail=f"rank {rank} ended with exit code 1, see {log}")
    story.log("rank-0.restart-1.err", "".join(f"line {number}\n" for number in range(100)))
    killed = "rank 0 ended with exit code -9 by SIGKILL, see /x/rank-0.restart-1.err"
    story.tell("rank_failed", detail=killed)
    return story


def test_first_error_comes_first_and_then_the_newest_log(crashed: Story, runs: Path, capsys):
    assert show(runs, "--lines", "2") == 0
    said, *lines = capsys.readouterr().out.splitlines()
    assert said == "rank 1 ended with exit code 1, see /moved/since/logs/node-1/rank-1.restart-0.err"
    assert lines[0] == "[rank1]: Traceback (most recent call last):"
    assert lines[5] == "[rank1]: RuntimeError: no memory"
    assert lines[6:] == ["", f"==> {crashed.newest.root}/logs/node-0/rank-0.restart-1.err <==", "line 98", "line 99"]


def test_any_log_can_be_asked_for(crashed: Story, runs: Path, capsys):
    assert show(runs, "--restart", "0", "--lines", "1") == 0
    assert capsys.readouterr().out.endswith("rank-0.restart-0.err <==\nOSError: closed\n")
    assert show(runs, "--rank", "1", "--lines", "1") == 0
    assert capsys.readouterr().out.endswith("terminate called without an active exception\n")
    (crashed.paths.submitit / "12_0_log.out").write_text("srun: error: n2: task 1: Killed\n")
    assert show(runs, "--job") == 0
    path = crashed.paths.submitit / "12_0_log.out"
    assert capsys.readouterr().out == f"==> {path} <==\nsrun: error: n2: task 1: Killed\n"
    crashed.attempt("12")
    assert show(runs, "--attempt", "0", "--lines", "0") == 0


@pytest.mark.parametrize("flags", [["--rank", "7"], ["--restart", "5"], ["--attempt", "3"], ["--job"]])
def test_log_that_is_not_there(crashed: Story, runs: Path, capsys, flags: list[str]):
    assert show(runs, *flags) == 1
    words = capsys.readouterr().err
    assert words.startswith("error: A log is there once what writes it has started") and "Traceback" not in words


def test_run_without_an_attempt_and_impossible_numbers(story: Story, runs: Path, capsys):
    assert show(runs) == 1
    assert show(runs, "--lines", "-1") == 78
    assert show(runs, "--lines", "many") == 78
    assert "Traceback" not in capsys.readouterr().err


def test_killed_rank_shows_the_end_of_its_log(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(20)))
    assert error_lines(log) == [f"line {number}" for number in range(12, 20)]


@pytest.mark.parametrize("count", [0, 1, 3, 1000, 5000])
def test_last_lines_of_a_long_log(tmp_path: Path, count: int):
    log = tmp_path / "log"
    every = [f"line {number} " + "x" * 100 for number in range(3000)]
    log.write_text("\n".join(every) + "\n")
    lines, size = last_lines(log, count)
    assert lines == every[len(every) - min(count, len(every)) :] and size == log.stat().st_size
    log.write_bytes(b"")
    assert last_lines(log, count) == ([], 0)


def test_follow_goes_through_restarts_and_attempts_to_the_end(
    story: Story, runs: Path, play: Play, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(log_following, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(log_following, "SECONDS_BETWEEN_SQUEUES", 0.05)
    story.job("12")
    play("squeue", "RUNNING\n")
    printed: list[int] = []
    watcher = threading.Thread(target=lambda: printed.append(show(runs, "--follow")))
    watcher.start()
    seen = ""

    def until(text: str) -> None:
        def look() -> bool:
            nonlocal seen
            seen += capsys.readouterr().out
            return text in seen

        wait_until(look, text)

    story.attempt("12")
    with story.log("rank-0.restart-0.err", "one\n").open("a") as log:
        until("one\n")
        log.write("two\n")
    until("two\n")
    story.log("rank-0.restart-1.err", "three\n")
    until("three\n")
    story.end("signalled", 75)
    play("squeue", "PENDING\n")
    time.sleep(0.2)
    assert watcher.is_alive()
    story.attempt("12")
    story.log("rank-0.restart-0.err", "four\n")
    until("four\n")
    story.end("complete", 0)
    watcher.join(10)
    assert printed == [0]
    assert seen.count("==> ") == 3


def test_ctrl_c_ends_following(story: Story, runs: Path, tmp_path: Path):
    story.job("12")
    story.attempt("12")
    story.log("rank-0.restart-0.err", "one\n")
    (tmp_path / "squeue").write_text("#!/bin/sh\necho RUNNING\n")
    (tmp_path / "squeue").chmod(0o755)
    command = [sys.executable, "-u", "-m", "launchers.logs", "medium-1", "--root", str(runs), "--follow"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline().startswith("==> ")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_follow_of_an_ended_run_ends_at_once(twin: RunPaths, capsys):
    assert main([str(twin.root), "--follow", "--lines", "3"]) == 0
    assert "complete: all 60 steps done" in capsys.readouterr().out  # a busy machine may have added alerts after it
