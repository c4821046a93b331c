"""The live view in a real terminal, driven by tmux: open, move, drill down, cancel a real run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from encdec.files import RunPaths
from tests.conftest import REPOSITORY, Lab, wait_for_step, wait_until
from tests.launchers.conftest import Story

pytestmark = pytest.mark.skipif(
    shutil.which("tmux") is None and os.geteuid() != 0,  # as root `make test` installs it: then its lack is a failure
    reason="needs tmux: apt-get install tmux",
)


@dataclass
class Terminal:
    """A program in a terminal of its own."""

    server: str
    """Name of the tmux server, which is this terminal's alone."""

    def tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-L", self.server, *words], capture_output=True, text=True, check=True)
        return done.stdout

    def open(self, command: str, *, width: int, height: int) -> None:
        plain = {"LANG": "C.UTF-8", "TERM": "screen-256color"}
        settings = [word for name, value in plain.items() for word in ("-e", f"{name}={value}")]
        size = ["-x", str(width), "-y", str(height)]
        self.tmux("-f", "/dev/null", "-u", "new-session", "-d", *size, *settings, "-c", str(REPOSITORY), command)

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def text(self) -> str:
        return self.tmux("capture-pane", "-p")

    def sees(self, *words: str) -> None:
        """Wait until all of it stands on the screen."""
        wait_until(lambda: all(word in self.text() for word in words), f"{words} on the screen")

    def is_open(self) -> bool:
        listed = subprocess.run(["tmux", "-L", self.server, "list-sessions"], capture_output=True, check=False)
        return listed.returncode == 0


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal(f"monitor-{os.getpid()}")
    yield terminal
    subprocess.run(["tmux", "-L", terminal.server, "kill-server"], capture_output=True, check=False)


def test_person_looks_drills_down_and_cancels(lab: Lab, terminal: Terminal, tmp_path: Path):
    root = tmp_path / "runs"
    live = RunPaths(root / "alive-1")
    other = Story(RunPaths(root / "ended-1")).begin()
    other.attempt(steps=range(1, 10))
    other.end("crash", 1)
    endless = ("training.num_train_steps=100000", "training.save_steps=50000", "training.early_stopping_enabled=false")
    lab.start_submit(live.root, *[word for setting in endless for word in ("--set", setting)])
    wait_for_step(live, 5)

    words = [sys.executable, "-m", "launchers.monitor", "--root", str(root)]
    terminal.open(shlex.join(words), width=80, height=24)
    terminal.sees("2 runs", "alive-1", "ended-1", "running here")
    first_seen = json.loads(live.attempt(0).steps.read_bytes().splitlines()[-1])["step"]
    wait_until(lambda: step_shown(terminal.text(), "alive-1") > first_seen, "the table goes on by itself")

    terminal.press("Down")
    terminal.sees("said crash")
    terminal.press("Up")
    terminal.sees("running here")

    terminal.press("Enter")
    terminal.sees("agent ready", "following")
    terminal.press("l")
    terminal.sees("attempt 0, rank 0", "INFO")
    terminal.press("/")
    terminal.sees("show only lines with")
    terminal.press("checkpoint", "Enter")
    terminal.sees("lines with 'checkpoint'")
    terminal.press("Escape")
    terminal.sees("2 runs")

    terminal.press("c")
    terminal.sees("cancel alive-1?", "y yes")
    terminal.press("n")
    terminal.sees("2 runs")
    assert not live.attempt(0).outcome.exists()
    terminal.press("c")
    terminal.sees("cancel alive-1?")
    terminal.press("y")
    wait_until(live.attempt(0).outcome.is_file, "the run has saved and ended")
    terminal.sees("cancelled by user")
    ended = json.loads(live.attempt(0).outcome.read_text())
    assert (ended["cause"], ended["checkpoint_verified"]) == ("signalled", True)
    assert ended["message"].startswith("stopped by SIGTERM")

    terminal.press("q")
    wait_until(lambda: not terminal.is_open(), "the monitor has ended")


def step_shown(text: str, run: str) -> int:
    """The step that the table has of a run; 0 before it has one."""
    row = next((line for line in text.splitlines() if line.startswith(run)), "")
    return max((int(word.partition("/")[0]) for word in row.split() if "/" in word), default=0)
