"""How a run is launched, beside what it computes: ``launch.json``, rewritten by every submission."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from encdec.files import AttemptPaths, RunPaths, atomic_write_json
from encdec.records import read_ends, read_json_lines, read_record, read_steps

ContinueBy = Literal["requeue", "successor"]
CONTINUE_BY: tuple[str, ...] = get_args(ContinueBy)
Launcher = Literal["torchrun", "accelerate"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)
DEFAULT_MAX_ATTEMPTS = 100
DEFAULT_LEAD_SECONDS = 120
MAX_FRUITLESS_ATTEMPTS = 5
"""Failures in a row without a new step, after which nothing continues a run by itself."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What a job needs to know about its ranks and its own continuation."""

    launcher: Launcher = "torchrun"
    """What starts the ranks of a node: torch elastic alone, or accelerate launch."""
    continue_by: ContinueBy = "requeue"
    """requeue: the same job again; successor: a job that waits for the end of this one, queued in advance."""
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    """Attempts of a run before nothing continues it by itself."""
    lead_seconds: int = DEFAULT_LEAD_SECONDS
    """Warning before the time limit."""
    env_secrets: tuple[str, ...] = ()
    """Names of the variables that --env-secret hands on; never a value."""

    def write(self, paths: RunPaths) -> None:
        atomic_write_json(paths.launch, asdict(self))


def read_launch_options(paths: RunPaths) -> LaunchOptions:
    """The options of the newest submission; the defaults where there was none.

    Raises:
        RunDirectoryError: a damaged file.
    """
    return read_record(paths.launch, LaunchOptions) if paths.launch.is_file() else LaunchOptions()


def launch_options(paths: RunPaths, arguments: Namespace) -> LaunchOptions:
    """The options that the user asks for, with a warning that suits the run's own saves and its time limit."""
    limit = limit_seconds(arguments.sbatch["time"]) if "time" in arguments.sbatch else None
    return LaunchOptions(
        launcher=arguments.launcher,
        continue_by=arguments.continue_by,
        max_attempts=arguments.max_attempts,
        lead_seconds=lead_seconds(measured_stop_seconds(paths), limit),
        env_secrets=tuple(arguments.env_secret),
    )


def lead_seconds(measured: float | None, limit: float | None) -> int:
    """Warning before the time limit: three times what a stop took so far, and half a minute for Slurm's own clock
    (it looks every 30 s); DEFAULT_LEAD_SECONDS before anything was measured; at most a third of the limit. Pure.

    Args:
        measured: seconds of the slowest step, save and verification so far.
        limit: time limit of the job, seconds.
    """
    lead = DEFAULT_LEAD_SECONDS if measured is None else 30 + 3 * measured
    return max(1, math.ceil(lead if limit is None else min(lead, limit / 3)))


def measured_stop_seconds(paths: RunPaths) -> float | None:
    """Seconds of the slowest step and of what saving can take at a stop, from what the run has done; None before the
    first save.
    """
    attempts = [paths.attempt(number) for number in paths.attempt_numbers()]
    steps = [record["step_seconds"] for attempt in attempts for record in read_steps(attempt.steps)]
    return stop_seconds(attempts, max(steps, default=0.0))


def newest_stop_seconds(attempt: AttemptPaths) -> float | None:
    """As ``measured_stop_seconds``, of one attempt and by its last step only: cheap enough to ask now and then."""
    _, last = read_ends(attempt.steps)
    return stop_seconds([attempt], (last or {}).get("step_seconds", 0.0))


def stop_seconds(attempts: Iterable[AttemptPaths], step: float) -> float | None:
    """Seconds of a step and of saving after it, by the slowest save of ``attempts``; None if there was none. The last
    checkpoint is written and read back; one that is being written in the background comes first.
    """
    saves = [r for a in attempts for r in read_json_lines(a.events("rank-0")) if r["event"] == "saved"]
    background = any(save.get("blocking_seconds", save["seconds"]) < save["seconds"] for save in saves)
    return step + (3 if background else 2) * max(save["seconds"] for save in saves) if saves else None


def limit_seconds(text: str) -> float:
    """sbatch's --time in seconds; the forms of sbatch(1), minutes first where there are no hours or days."""
    if text == "UNLIMITED":
        return math.inf
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = ([*parts, 0, 0])[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, ([*parts, 0])[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class PastAttempt:
    """What the limits need to know of an attempt."""

    best_step: int
    """Highest step it did; 0: none."""
    stopped: bool
    """Whether it was asked to stop, and did: no failure of its own."""


def why_given_up(options: LaunchOptions, attempts: Sequence[PastAttempt]) -> str | None:
    """Why no further attempt should follow these by itself, or None. Pure.

    Args:
        attempts: oldest first.
    """
    if len(attempts) >= options.max_attempts:
        return f"{len(attempts)} attempts, and --max-attempts allows {options.max_attempts}"
    failures, best = 0, 0
    for attempt in attempts:
        if attempt.best_step > best:
            failures, best = 0, attempt.best_step
        elif not attempt.stopped:
            failures += 1
    return f"{failures} failed attempts in a row without a new step" if failures >= MAX_FRUITLESS_ATTEMPTS else None
