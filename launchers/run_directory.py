"""Makes a run directory whole or not at all, and refuses one that was made for something else."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import encdec
import launchers
from encdec.errors import RunDirectoryError
from encdec.files import AttemptPaths, RunPaths, atomic_write_json, staged_directory
from encdec.records import JsonLinesWriter, event
from encdec.training.run_config import RunConfig
from launchers.plan import Plan

SNAPSHOT = (encdec, launchers)


@dataclass(frozen=True)
class RunStatus:
    """What a run directory says about its newest attempt."""

    attempts: int
    running: bool
    outcome: dict[str, Any] | None
    """outcome.json of the newest attempt that has one."""

    @property
    def complete(self) -> bool:
        return self.outcome is not None and self.outcome["cause"] == "complete"


def make_run_directory(paths: RunPaths, run: RunConfig, plan: Plan) -> None:
    """Write run.yaml, plan.json and the snapshot of the code into a new directory, in one rename.

    Raises:
        RunDirectoryError: not writable, or it came into being meanwhile.
    """
    try:
        with staged_directory(paths.root) as staging:
            new = RunPaths(staging)
            run.write(new.run_yaml)
            atomic_write_json(new.plan, plan.to_mapping())
            snapshot_code(new.code)
            new.make()
            new.submitit.mkdir()
            staging.chmod(0o750)
    except FileExistsError:
        raise RunDirectoryError(
            "A run directory is made once",
            found=f"{paths.root} appeared meanwhile",
            remedy="Give the same command again",
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            "The run directory must be writable",
            found=f"{paths.root} ({error.strerror})",
            remedy="Choose another with --run-dir, or free or open the folder above it",
        ) from None
    note(paths, "created", name=run.name)


def read_status(paths: RunPaths) -> RunStatus:
    """What the run directory says now. Asks nobody."""
    numbers = paths.attempt_numbers()
    outcomes = [paths.attempt(number).outcome for number in numbers]
    written = [path for path in outcomes if path.is_file()]
    outcome = json.loads(written[-1].read_text()) if written else None
    running = bool(numbers) and not outcomes[-1].is_file() and is_alive(paths.attempt(numbers[-1]))
    return RunStatus(len(numbers), running, outcome)


def is_alive(attempt: AttemptPaths) -> bool:
    """Whether the process that runs ``attempt`` lives on this machine."""
    if not attempt.process.is_file():
        return False
    facts = json.loads(attempt.process.read_text())
    if facts["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(facts["pid"])
        return process.create_time() == facts["created"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def note(paths: RunPaths, kind: str, **facts: Any) -> None:
    """One line in the run's own ledger (the launcher's; attempts have their own)."""
    with JsonLinesWriter(paths.events) as ledger:
        ledger.write(event(kind, **facts))


def snapshot_code(target: Path) -> None:
    """Copy the packages as they are now, with the state of their git checkout if they lie in one."""
    for package in SNAPSHOT:
        source = Path(package.__path__[0])
        shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("*.tmp"))
    atomic_write_json(target / "git.json", git_state(Path(encdec.__path__[0]).parent))


def code_environment(paths: RunPaths) -> dict[str, str]:
    """Variables with which a job runs the snapshot, not the checkout."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.code), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",  # python -m would put the working directory first
    }


def git_state(folder: Path) -> dict[str, str | None]:
    """Commit and uncommitted changes of the checkout; None where there is no git."""

    def git(*words: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False, timeout=30,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    return {"commit": git("rev-parse", "HEAD"), "uncommitted": git("status", "--porcelain")}
