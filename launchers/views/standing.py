"""How a run stands, in a word and a sentence. Pure: what the records and Slurm say in, verdict out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from launchers.slurm import UNASKED, UNKNOWN, JobState
from launchers.views.history import AttemptView


class State(StrEnum):
    """Where a run is in its life. Programs read these words; they stay."""

    NEW = "new"
    """Made, and nothing of it ever started."""
    PENDING = "pending"
    RUNNING = "running"
    COMPLETE = "complete"
    GATE = "gate"
    """A bound of its phase was not met."""
    BLOCKED = "blocked"
    """It never began, because the phase before has not passed its gate, and nothing will start it by itself."""
    REFUSED = "refused"
    CRASHED = "crashed"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    """It saved and left, and nothing continues it by itself."""
    LOST = "lost"
    """It ended without a word."""
    UNKNOWN = "unknown"
    """Nobody can say whether its job lives."""
    DAMAGED = "damaged"


ENDED: Mapping[str, tuple[State, str]] = {
    "gate": (State.GATE, "gate not passed"),
    "refused": (State.REFUSED, "refused"),
    "crash": (State.CRASHED, "crashed"),
    "bad_node": (State.CRASHED, "crashed"),
    "signalled": (State.STOPPED, "stopped"),
    "stop_requested": (State.STOPPED, "stopped"),
}
"""Outcome.cause -> the word for programs, and the one for people."""
CONTINUABLE = frozenset({State.CRASHED, State.CANCELLED, State.STOPPED, State.LOST, State.NEW, State.BLOCKED})
"""Where the submit command, given again, continues the run."""


@dataclass(frozen=True)
class Standing:
    """How a run stands."""

    state: State
    words: str
    job: str | None = None
    """The Slurm job that the words are about."""


def standing(
    newest: AttemptView | None,
    jobs: Mapping[str, JobState],
    *,
    host: str | None,
    here: bool,
    cancelled: bool,
    unanswered: bool,
    after: str | None = None,
    not_started: str | None = None,
) -> Standing:
    """The verdict. A job of which nobody can say that it ended is no end.

    Args:
        newest: the newest attempt.
        jobs: those that may still do something for the run, or did last, by id; the one that runs it first.
        host: the machine on which an attempt runs outside Slurm.
        here: whether that is this one.
        cancelled: whether a user cancelled what the run did last.
        unanswered: whether sbatch's answer to the newest submission never arrived.
        after: the phase for whose gate a run waits that has not begun.
        not_started: why it was not started, as the jobs of its chain say.
    """
    if newest and newest.cause == "complete":
        return Standing(State.COMPLETE, "complete")
    if host:
        return Standing(State.RUNNING, "running here" if here else f"running on {host}")
    for job, said in jobs.items():
        if said.state in (UNKNOWN, UNASKED) and newest and newest.final and newest.job == job:
            continue  # its own last word tells more than Slurm's silence
        if not said.ended:
            if after and said.state != "PENDING":
                return Standing(State.PENDING, f"waits for {after} in job {job}, which is {said.state}", job)
            state, words = of_a_live_job(job, said)
            return Standing(state, f"{words}, after {after}" if after else words, job)
    if unanswered:
        return Standing(State.UNKNOWN, "submitted, but sbatch's answer was lost: submit again to find the job")
    last = next(iter(jobs), None)
    if not_started and newest is None:
        return Standing(State.BLOCKED, f"not started: {not_started}", last)
    if cancelled:
        return Standing(State.CANCELLED, "cancelled by user", last)
    if newest and newest.cause is not None:
        state, words = ENDED.get(newest.cause, (State.STOPPED, newest.cause))
        return Standing(state, f"given up after {newest.given_up}" if newest.given_up else words, last)
    how = f" (job {last}: {jobs[last].state})" if last else ""
    if newest or last:
        what = "ended without a word" if newest else "ended before its first attempt"
        return Standing(State.LOST, what + how, last)
    return Standing(State.NEW, f"not started: {after} has not passed its gate" if after else "not started")


def of_a_live_job(job: str, said: JobState) -> tuple[State, str]:
    if said.state == UNKNOWN:
        return State.UNKNOWN, f"job {job} is UNKNOWN: neither squeue nor sacct answers"
    if said.state == UNASKED:
        return State.UNKNOWN, f"job {job}: Slurm has not been asked yet"
    if said.state != "PENDING":
        return State.RUNNING, f"job {job} is {said.state}"
    why = [said.reason] if said.reason not in ("", "None") else []
    expected = [f"expected to start {clock(said.start)}"] if said.start else []
    release = ["python -m launchers.requeue releases it"] if said.held else []
    reasons = ", ".join(why + expected + release)
    return State.PENDING, f"job {job} is PENDING" + (f" ({reasons})" if reasons else "")


def clock(moment: float) -> str:
    """A local time of day, with the date if it is not today."""
    then = time.localtime(moment)
    today = time.strftime("%F", then) == time.strftime("%F")
    return time.strftime("%H:%M:%S" if today else "%F %H:%M", then)
