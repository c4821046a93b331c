"""Slurm's commands as scripts that answer what the real ones answered."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from encdec.files import AttemptPaths, RunPaths, atomic_write_json
from encdec.records import (
    ContinuationRecord,
    JobRecord,
    JsonLinesWriter,
    Outcome,
    ProcessRecord,
    StepRecord,
    event,
)
from encdec.training.execution import TrainingPhase
from encdec.training.promotion import GateFile
from encdec.training.run_config import resolve_run
from launchers import slurm
from tests.conftest import MICRO

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


@dataclass
class Story:
    """Writes a run directory's records as launcher, agents and ranks would have, one attempt after the other."""

    paths: RunPaths
    submitted: float = 1000.0
    """Seconds since the epoch."""

    def begin(self) -> Story:
        self.paths.make()
        self.paths.submitit.mkdir()
        resolve_run(TrainingPhase("sanity_check"), config_file=MICRO).write(self.paths.run_yaml)
        return self

    def job(self, job: str | None) -> None:
        record = JobRecord(submission="ab", job=job, submitted=self.submitted)
        atomic_write_json(self.paths.job, record.to_json())

    def runs_in(self, job: str, successor: str | None = None) -> None:
        atomic_write_json(self.paths.continuation, ContinuationRecord(job=job, successor=successor).to_json())

    def attempt(self, job: str | None = None, *, host: str = "n1", pid: int = 1, steps: range = range(0)) -> int:
        """An attempt that has begun, as old as the submissions and a little; returns its number."""
        number = self.paths.claim_attempt()
        place = self.paths.attempt(number)
        process = ProcessRecord(host=host, pid=pid, created=self.submitted + number + 1, job=job)
        atomic_write_json(place.process, process.to_json())
        with JsonLinesWriter(place.steps) as writer:
            for step in steps:
                writer.write(step_record(step).to_json())
        place.heartbeat(0).touch()
        return number

    def end(self, cause: str, exit_code: int) -> None:
        outcome = Outcome(cause=cause, exit_code=exit_code, step=9, checkpoint="step-9", message=f"said {cause}")
        atomic_write_json(self.newest.outcome, outcome.to_json())
        if cause == "complete":
            GateFile(
                phase=TrainingPhase.SANITY_CHECK, passed=True, identity="", step=9, checkpoint="step-9",
                weights_digest="ab", first_loss=7.0, last_loss=5.0, time=1.0,
            ).write(self.paths)  # fmt: skip

    def tell(self, kind: str, *, node: int = 0, **facts: Any) -> None:
        with JsonLinesWriter(self.newest.events(f"node-{node}")) as ledger:
            ledger.write(event(kind, **facts))

    def log(self, name: str, text: str, *, node: int = 0) -> Path:
        folder = self.newest.rank_logs(node)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return folder / name

    @property
    def newest(self) -> AttemptPaths:
        number = self.paths.newest_attempt()
        assert number is not None
        return self.paths.attempt(number)


def step_record(step: int) -> StepRecord:
    return StepRecord(
        step=step, loss=7.0 - step / 10, grad_norm=1.0, learning_rate=1e-3, tokens_seen=384 * step,
        tokens_per_second=9000.0, step_seconds=0.04, data_seconds=0.0, samples_consumed=8 * step, memory_gb=0.4,
        attempt=0, restart=0, time=time.time(),
    )  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A root of runs."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def story(runs: Path) -> Story:
    """The run "medium-1", of which nothing has started yet."""
    return Story(RunPaths(runs / "medium-1")).begin()
