"""Which log says what: of a rank, of a Slurm job, and where the first error of an attempt stands."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from encdec.errors import EncdecError
from encdec.files import AttemptPaths, RunPaths
from encdec.records import ProcessRecord, read_json_lines, read_record
from launchers.jobs import newest_jobs

BLOCK_BYTES = 1 << 16
LINES_OF_AN_ERROR = 8
FAILED = re.compile(r"rank \d+ ended .*, see (?P<log>.*)")
"""What an agent's event says of a rank that failed; its log's path as it was then."""
TRACEBACK = re.compile(r"(?P<prefix>\[rank\d+\]: )?Traceback \(most recent call last\):")
RESTART = re.compile(r"rank-\d+\.restart-(\d+)\.err")


@dataclass(frozen=True)
class FirstError:
    """The first failure of an attempt."""

    said: str
    """The agent's line."""
    lines: list[str]
    """The end of its first traceback; without one, of its log."""


def rank_log(attempt: AttemptPaths, rank: int, restart: int | None) -> Path | None:
    """The log of a rank, of its newest start unless another is asked for; None if there is none."""
    found = {int(match.group(1)): path for path, match in rank_logs(attempt, rank)}
    return found.get(max(found) if restart is None else restart) if found else None


def rank_logs(attempt: AttemptPaths, rank: int) -> list[tuple[Path, re.Match[str]]]:
    paths = attempt.root.glob(f"logs/node-*/rank-{rank}.restart-*.err")
    matches = ((path, RESTART.fullmatch(path.name)) for path in paths)
    return [(path, match) for path, match in matches if match]


def job_log(paths: RunPaths, attempt: int | None) -> Path | None:
    """What the job of an attempt wrote itself, all its starts in a row; without an attempt the newest job's."""
    jobs = newest_jobs(paths)[:1]
    if attempt is not None and paths.attempt(attempt).process.is_file():
        job = read_record(paths.attempt(attempt).process, ProcessRecord).job
        jobs = [job] if job else []
    logs = [paths.submitit / f"{job}_0_log.out" for job in jobs] or list(paths.submitit.glob("*_0_log.out"))
    return max((log for log in logs if log.is_file()), key=lambda log: log.stat().st_mtime, default=None)


def first_error(attempt: AttemptPaths) -> FirstError | None:
    """The failure that came first. Of ranks that one look found dead, it is the one whose log fell silent first."""
    failures = sorted(failures_of(attempt), key=lambda failure: failure[:2])
    if not failures:
        return None
    _, _, said, log = failures[0]
    return FirstError(said, error_lines(log) if log.is_file() else [])


def failures_of(attempt: AttemptPaths) -> list[tuple[int, float, str, Path]]:
    """(restarts before, when its log was last written, the agent's line, the log) of each rank that failed."""
    failures = []
    for ledger in attempt.root.glob("events-node-*.jsonl"):
        folder = attempt.root / "logs" / ledger.stem.removeprefix("events-")
        for record in read_json_lines(ledger):
            said = str(record.get("detail")) if record.get("event") == "rank_failed" else ""
            match = FAILED.fullmatch(said)
            name = RESTART.fullmatch(Path(match["log"]).name) if match else None
            if name:
                log = folder / name.string
                silent_since = log.stat().st_mtime if log.is_file() else float("inf")
                failures.append((int(name.group(1)), silent_since, said, log))
    return failures


def error_lines(log: Path) -> list[str]:
    """The last lines of the first traceback in a log; without one, of the log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    began = next((number for number, line in enumerate(lines) if TRACEBACK.fullmatch(line)), None)
    if began is None:
        return lines[-LINES_OF_AN_ERROR:]
    prefix = TRACEBACK.fullmatch(lines[began])["prefix"] or ""  # type: ignore[index]
    end = began + 1
    while end < len(lines) and lines[end].removeprefix(prefix).startswith(" "):
        end += 1
    return lines[began : end + 1][-LINES_OF_AN_ERROR:]


def last_lines(path: Path, count: int) -> tuple[list[str], int]:
    """The last ``count`` lines of a file, however long it is, and how many bytes of it have been read."""
    with path.open("rb") as stream:
        size = position = stream.seek(0, os.SEEK_END)
        tail = b""
        while position and tail.count(b"\n") <= count:
            step = min(BLOCK_BYTES, position)
            position -= step
            stream.seek(position)
            tail = stream.read(step) + tail
    lines = tail.decode("utf-8", errors="replace").splitlines()
    return lines[len(lines) - count :] if count < len(lines) else lines, size


def require_log(log: Path | None, what: str, paths: RunPaths) -> Path:
    """The log, if there is one.

    Raises:
        EncdecError: there is none.
    """
    if log is not None and log.is_file():
        return log
    there = sorted(path.name for path in paths.attempts.glob("*/logs/node-*/*.err"))
    raise EncdecError(
        "A log is there once what writes it has started",
        found=f"none of {what}" + (f"; there are {', '.join(dict.fromkeys(there))}" if there else ""),
        remedy="--attempt, --rank and --restart choose another, --job shows what the job itself said, --follow waits",
    )
