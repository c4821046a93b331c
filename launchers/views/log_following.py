"""Follows a run's log through restarts, requeues and successors, until nothing of the run lives."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from encdec.errors import ExitCode
from encdec.files import RunPaths
from encdec.records import Outcome, ProcessRecord, read_record
from launchers.jobs import began_since_submission, live_job, newest_jobs, submission
from launchers.run_status import read_status
from launchers.views.log_files import last_lines
from launchers.views.watch import LOOKS_TO_BELIEVE_AN_END, SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_SQUEUES


def follow(paths: RunPaths, newest_log: Callable[[], Path | None], *, lines: int) -> None:
    """Print what is written to the newest log, beginning with its last ``lines``, until the run's work is over.

    Args:
        newest_log: which log it is now.
    """
    life, shown, offset = Life(paths), None, 0
    while True:
        over = life.over()  # asked before the last look at the log: what comes later is none of it
        log = newest_log()
        if log is not None and log.is_file():
            if log != shown:
                print(f"==> {log} <==")
                before, offset = last_lines(log, lines) if shown is None else ([], 0)
                print(*before, sep="\n", end="\n" if before else "")
                shown = log
            offset += print_from(log, offset)
        if over:
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def print_from(log: Path, offset: int) -> int:
    """Print what stands in a log from ``offset`` on; returns how many bytes that is."""
    with log.open("rb") as stream:
        stream.seek(offset)
        fresh = stream.read()
    sys.stdout.write(fresh.decode("utf-8", errors="replace"))
    sys.stdout.flush()
    return len(fresh)


class Life:
    """Whether anything of a run lives. Slurm is asked at most once in SECONDS_BETWEEN_SQUEUES.

    Args:
        paths: the run directory.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._ends_seen = 0
        self._next_squeue = 0.0

    def over(self) -> bool:
        if read_status(self._paths).host is not None:
            return False
        if self._has_ended_itself() or not newest_jobs(self._paths):
            return True
        if time.monotonic() >= self._next_squeue:
            self._next_squeue = time.monotonic() + SECONDS_BETWEEN_SQUEUES
            self._ends_seen = 0 if live_job(self._paths) else self._ends_seen + 1
        return self._ends_seen >= LOOKS_TO_BELIEVE_AN_END

    def _has_ended_itself(self) -> bool:
        """Whether the newest attempt, if it is the newest submission's, ended so that nothing goes on by itself."""
        number = self._paths.newest_attempt()
        attempt = None if number is None else self._paths.attempt(number)
        if attempt is None or not attempt.outcome.is_file() or not attempt.process.is_file():
            return False
        ended = read_record(attempt.outcome, Outcome).exit_code != ExitCode.CONTINUE_ME
        began = read_record(attempt.process, ProcessRecord).created
        return ended and began_since_submission(began, submission(self._paths))
