"""What runs: the newest attempt of a run directory, where it lives, and who may start the next one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import psutil

from encdec.errors import RunDirectoryError
from encdec.files import AttemptPaths, RunPaths
from encdec.records import Outcome, ProcessRecord, read_record

SECONDS_TO_BELIEVE_DEAD = 60.0
"""After an agent's last heartbeat (one in 10 s), seen from another machine."""
SECONDS_TO_START = 600.0
"""How long another command may take to start an attempt."""
SECONDS_BETWEEN_LOOKS = 0.1
CLOCK_TOLERANCE_SECONDS = 2.0
"""A process's creation time is counted from the boot, whose own time moves when the clock is set."""


@dataclass(frozen=True)
class RunStatus:
    """What a run directory says about its newest attempt."""

    attempts: list[int]
    """Numbers of all attempts, ascending."""
    host: str | None
    """The machine on which an attempt runs outside Slurm, or None."""
    outcome: Outcome | None
    """Outcome of the newest attempt that has one."""
    passed: bool
    """Whether a gate file says that its phase has passed."""

    @property
    def running(self) -> bool:
        """Whether an attempt runs on this machine, outside Slurm."""
        return self.host == socket.gethostname()

    @property
    def complete(self) -> bool:
        """Done and judged: a run whose gate file is lost is judged again by another attempt, without a step."""
        return self.outcome is not None and self.outcome.cause == "complete" and self.passed


def read_status(paths: RunPaths) -> RunStatus:
    """What the run directory says now. Asks nobody.

    Raises:
        RunDirectoryError: a damaged record.
    """
    numbers = paths.attempt_numbers()
    attempts = [paths.attempt(number) for number in numbers]
    written = [attempt.outcome for attempt in attempts if attempt.outcome.is_file()]
    outcome = read_record(written[-1], Outcome) if written else None
    ended = not attempts or attempts[-1].outcome.is_file()
    return RunStatus(numbers, None if ended else host_of(attempts[-1]), outcome, has_passed(paths))


def has_passed(paths: RunPaths) -> bool:
    """Whether one of its gate files says so; a damaged one says nothing."""
    for file in paths.gates.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            verdict = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(verdict, dict) and verdict.get("passed") is True:
                return True
    return False


def host_of(attempt: AttemptPaths) -> str | None:
    """The machine on which an attempt without an outcome lives, or None; of one in a Slurm job, only Slurm knows."""
    if not attempt.process.is_file():
        return None
    process = read_record(attempt.process, ProcessRecord)
    if process.job is not None:
        return None
    if process.host != socket.gethostname():
        return process.host if seconds_since_heartbeat(attempt) < SECONDS_TO_BELIEVE_DEAD else None
    return process.host if is_alive(process) else None


def is_alive(record: ProcessRecord) -> bool:
    """Whether a process of this machine lives."""
    try:
        process = psutil.Process(record.pid)
        apart = abs(process.create_time() - record.created)
        return apart < CLOCK_TOLERANCE_SECONDS and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def seconds_since_heartbeat(attempt: AttemptPaths) -> float:
    """Age of the newest sign of life of the attempt's head node; of one that has just been claimed, of its claim."""
    signs = [path for path in (attempt.heartbeat(0), attempt.process) if path.exists()] or [attempt.root]
    return time.time() - max(path.stat().st_mtime for path in signs)


def require_not_elsewhere(paths: RunPaths, status: RunStatus) -> None:
    """Refuse to start an attempt while one runs on another machine.

    Raises:
        RunDirectoryError: naming the machine.
    """
    if status.host is not None and not status.running:
        ago = seconds_since_heartbeat(paths.attempt(status.attempts[-1]))
        raise RunDirectoryError(
            "A run runs in one place at a time",
            found=f"attempt {status.attempts[-1]} on {status.host}, heard of {ago:.0f} s ago",
            remedy=f"Give the command there to follow it; if it is dead, wait {SECONDS_TO_BELIEVE_DEAD:.0f} s and give "
            "the command here again",
        )


@contextlib.contextmanager
def only_starter(paths: RunPaths) -> Iterator[None]:
    """Of two commands that would start an attempt, the second waits, and then sees the first one's.

    Raises:
        RunDirectoryError: the other takes longer than SECONDS_TO_START, or took the directory away.
    """
    deadline = time.monotonic() + SECONDS_TO_START
    with paths.lock.open("a") as lock:
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise RunDirectoryError(
                    "One command at a time starts an attempt",
                    found=f"{paths.lock} held by another for {SECONDS_TO_START:.0f} s",
                    remedy="End that command, then give this one again",
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if not paths.run_yaml.is_file():
            raise RunDirectoryError(
                "A run directory holds run.yaml",
                found=f"{paths.root}, which another command has taken away",
                remedy="Give the same command again",
            )
        yield


def _locked(lock: IO[str]) -> bool:
    """Whether the lock is ours now; also where the file system has no locks: attempts are fenced all the same."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    return True
