"""A run's whole life as its records tell it: attempts, starts of their ranks, steps, saves, alerts. Asks nobody.

Times are seconds since the epoch. A line that lacks what every line of its kind has is passed over.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from encdec.errors import RunDirectoryError
from encdec.files import AttemptPaths, RunPaths
from encdec.records import START_UP, Outcome, ProcessRecord, read_json_lines, read_record, read_steps
from encdec.training.promotion import phase_before, read_gate
from encdec.training.run_config import RunConfig

COLUMNS = (
    "step", "restart", "time", "step_seconds", "data_seconds", "loss", "grad_norm", "learning_rate",
    "tokens_per_second", "tokens_seen", "memory_gb",
)  # fmt: skip
"""Fields of a StepRecord that are kept."""
PLACING = COLUMNS[:4]
"""Of them, those without which a step has no place in the story."""
Steps = Mapping[str, np.ndarray]
"""By column, float64 [N], in the order of the records."""
Event = Mapping[str, Any]


class Mark(NamedTuple):
    """A part of a start is done."""

    time: float
    done: str
    """launch | imports | rendezvous | load"""
    restart: int


class Save(NamedTuple):
    """A committed checkpoint."""

    step: int
    restart: int
    seconds: float
    """From its beginning to its commit."""
    blocking_seconds: float
    """For which training stood still."""


@dataclass(frozen=True, kw_only=True)
class AttemptStory:
    """One attempt."""

    number: int
    host: str | None
    job: str | None
    began: float
    """When its process began to load the launcher; else its first sign of life; 0 where there is none."""
    marks: Sequence[Mark]
    """In order of time."""
    steps: Steps
    failures: Mapping[int, tuple[float, str]]
    """Restarts in place before -> when the first rank was seen dead, and what was said of it."""
    restarts: Mapping[int, float]
    """Number of a restart in place -> when it began."""
    saves: Sequence[Save]
    evaluations: Sequence[tuple[int, float]]
    """(step, when its evaluation was done)"""
    events: Sequence[Event]
    """Of rank 0, in order; alerts, closed gates and roll-backs among them."""
    outcome: Outcome | None
    ended: float | None
    """None: killed, or it lives."""
    queued: bool
    """Whether its own job or a successor was in the queue, to go on after it."""
    last_sign: float

    @property
    def cause(self) -> str:
        """How it ended, in the words of Outcome.cause; killed where it left none."""
        return self.outcome.cause if self.outcome else "killed"


@dataclass(frozen=True, kw_only=True)
class RunStory:
    """One run."""

    began: float
    """When it was first asked for; a later phase of a chain not before the gate that opened it."""
    submissions: Sequence[float] = ()
    """When it was submitted, in order."""
    attempts: Sequence[AttemptStory] = ()
    """Oldest first."""
    saved_step: int = 0
    """Step of the newest checkpoint; 0 where there is none."""

    @property
    def last_sign(self) -> float:
        """Time of the newest record."""
        return max([self.began, *self.submissions, *(attempt.last_sign for attempt in self.attempts)])


def read_story(paths: RunPaths, run: RunConfig) -> RunStory:
    """Read the records of a run.

    Raises:
        RunDirectoryError: a damaged record, or nothing to tell of yet.
    """
    attempts = [read_attempt(number, paths.attempt(number)) for number in paths.attempt_numbers()]
    told = list(timed(read_json_lines(paths.events)))
    submissions = [event["time"] for event in told if event["event"] == "submitted"]
    begun = [attempt.began for attempt in attempts if attempt.began > 0]
    signs = submissions or [*(event["time"] for event in told), *begun]
    if not signs:
        raise RunDirectoryError(
            "A run's records say when it was submitted, or when an attempt of it began",
            found=f"neither in {paths.root}",
            remedy="Submit it first; python -m launchers.status lists what has been",
        )
    newest = paths.newest_checkpoint()
    return RunStory(
        began=max(min(signs), opened(run)),
        submissions=submissions,
        attempts=attempts,
        saved_step=int(newest.name.removeprefix("step-")) if newest else 0,
    )


def opened(run: RunConfig) -> float:
    """When the gate was passed that opened the phase; 0 where there is none, or no more of it."""
    start, phase = run.starts_from, run.phase
    if start is None or start.kind != "gate" or phase is None:
        return 0.0
    gate = read_gate(RunPaths(Path(start.source)), phase_before(phase.phase))
    return gate.time if gate and gate.passed else 0.0


def read_attempt(number: int, paths: AttemptPaths) -> AttemptStory:
    """Read the records of an attempt.

    Raises:
        RunDirectoryError: a damaged one.
    """
    process = read_record(paths.process, ProcessRecord) if paths.process.is_file() else None
    outcome = read_record(paths.outcome, Outcome) if paths.outcome.is_file() else None
    head = list(timed(read_json_lines(paths.events("node-0"))))
    others = [path for path in sorted(paths.root.glob("events-node-*.jsonl")) if path != paths.events("node-0")]
    nodes = [*head, *(event for path in others for event in timed(read_json_lines(path)))]
    leader = list(timed(read_json_lines(paths.events("rank-0"))))
    steps = columns_of(paths.steps)
    signs = [event["time"] for event in (*nodes, *leader)] + steps["time"][:1].tolist() + steps["time"][-1:].tolist()
    if outcome:
        signs.append(outcome.time)
    ends = [event["time"] for event in head if event["event"] == "ended"]
    began = [event["began"] for event in head if event["event"] == "claimed" and is_time(event.get("began"))]
    created = process.created if process else 0.0
    return AttemptStory(
        number=number,
        host=process.host if process else None,
        job=process.job if process else None,
        began=began[0] if began else min([*signs, *([created] if created else [])], default=0.0),
        marks=sorted(marks_of(head) + marks_of(leader)),
        steps=steps,
        failures=first_failures(nodes),
        restarts={
            event["restart"]: event["time"]
            for event in head
            if event["event"] == "restarting" and isinstance(event.get("restart"), int)
        },
        saves=list(saves_of(leader)),
        evaluations=[
            (event["step"], event["time"])
            for event in leader
            if event["event"] == "evaluated" and is_number(event.get("step"))
        ],
        events=leader,
        outcome=outcome,
        ended=max([outcome.time, *ends]) if outcome else None,
        queued=is_queued(head),
        last_sign=max([*signs, created]),
    )


def columns_of(file: Path) -> Steps:
    """The step records of a file, by column."""
    rows = array("d")
    for record in read_steps(file):
        rows.extend([float(record[name]) for name in COLUMNS])
    table = np.asarray(rows, dtype=np.float64).reshape(-1, len(COLUMNS)).T
    placed = np.isfinite(table[: len(PLACING)]).all(axis=0)
    return {name: column[placed] for name, column in zip(COLUMNS, table, strict=True)}


def timed(events: Iterable[Event]) -> Iterator[Event]:
    """Those that say what they are, and when."""
    return (event for event in events if isinstance(event.get("event"), str) and is_time(event.get("time")))


def is_time(value: object) -> TypeGuard[float]:
    """Whether it can be seconds since the epoch."""
    return is_number(value) and 0 < value < 1e11


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def marks_of(events: Iterable[Event]) -> list[Mark]:
    """Those of one writer. What an agent does before it is ready is its launch."""
    marks = [Mark(event["time"], "launch", 0) for event in events if event["event"] == "agent_ready"]
    return marks + [
        Mark(event["time"], event["done"], event["restart"])
        for event in events
        if event["event"] == START_UP and isinstance(event.get("restart"), int) and isinstance(event.get("done"), str)
    ]


def first_failures(events: Iterable[Event]) -> dict[int, tuple[float, str]]:
    """Of all nodes: restarts before -> when the first rank was seen dead, and what its agent said."""
    first: dict[int, tuple[float, str]] = {}
    for event in events:
        if event["event"] == "rank_failed" and isinstance(event.get("restart"), int):
            said = (event["time"], str(event.get("detail", "")))
            first[event["restart"]] = min(first.get(event["restart"], said), said)
    return first


def saves_of(events: Iterable[Event]) -> Iterator[Save]:
    """The committed checkpoints, each with the restarts in place before it."""
    restart = 0
    for event in events:
        if event["event"] == START_UP:
            restart = event.get("restart", restart)
        elif event["event"] == "saved" and is_number(event.get("step")) and is_number(event.get("seconds")):
            blocking = event.get("blocking_seconds")  # older ledgers knew no other saves than those that block
            yield Save(event["step"], restart, event["seconds"], blocking if is_number(blocking) else event["seconds"])


def is_queued(events: Iterable[Event]) -> bool:
    """Whether something waits in the queue to go on after the attempt, as its head node's ledger says."""
    waiting: set[Any] = set()
    for event in events:
        if event["event"] in ("requeued", "successor_queued"):
            waiting.add(event.get("job"))
        elif event["event"] == "successor_cancelled" and event.get("detail") is None:
            waiting.discard(event.get("job"))
    return bool(waiting)
