"""Slurm's commands as scripts that answer what the real ones answered."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launchers import slurm

UNREACHABLE = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


class Play:
    """Puts scripts on PATH that answer as the recorded command did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, command: str, out: str = "", err: str = "", code: int = 0) -> None:
        script = self.folder / command
        echo = f"printf %s {shlex.quote(out)}; printf %s {shlex.quote(err)} >&2"
        script.write_text(f'#!/bin/sh\necho "$@" >> {self.folder}/{command}.calls\n{echo}\nexit {code}\n')
        script.chmod(0o755)

    def calls(self, command: str) -> list[str]:
        path = self.folder / f"{command}.calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    for command in ("squeue", "sacct", "scontrol"):  # whatever the machine has installed
        Play(tmp_path)(command, err=UNREACHABLE, code=1)
    monkeypatch.setattr(slurm, "SECONDS_BETWEEN_REQUEUE_TRIES", 0.0)
    return Play(tmp_path)
