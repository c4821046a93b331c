"""What the attempts of a run did, one after the other, as their records say."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encdec.files import AttemptPaths
from encdec.records import Outcome, ProcessRecord, read_ends, read_record
from launchers.views.growing_files import Memory

TROUBLES = {
    "alert": "{message}",
    "rolled_back": "from step {from_step} to step {to_step}: {cause}",
    "save_failed": "no checkpoint of step {step}: {reason}",
    "mirror_failed": "{checkpoint}: {reason}",
    "mirror_behind": "waited {waited_seconds} s for the second place",
    "rank_failed": "{detail}",
}
"""Entries of an attempt's ledgers that somebody should see, and what they say of themselves."""
WORDS = TROUBLES | {"gate_not_passed": "{message}", "stopped_early": "{reason}"}
"""Those and the entries that end an attempt as it was meant to end."""
MOST_TROUBLES = 5


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One entry of a ledger that somebody should see."""

    kind: str
    """An alert's type, or the entry's kind."""
    time: float | None
    """Seconds since the epoch."""
    step: int | None
    message: str


@dataclass(frozen=True, kw_only=True)
class AttemptView:
    """One attempt, as a person is told of it."""

    number: int
    host: str | None
    """Its head node; None: killed before it could say."""
    job: str | None
    """Slurm job; None outside Slurm."""
    began: float | None
    """When its process was created, seconds since the epoch."""
    cause: str | None
    """How it ended, in the words of Outcome.cause; None: it has not, or without a word."""
    message: str | None
    first_step: int | None
    last_step: int | None
    loss: float | None
    """Of the last step, nats; None, too, if it is no number."""
    restarts: int
    """Times its ranks were started again in place."""
    move: str | None
    """What its head task decided (launchers.nodes.outcomes.Move); None outside Slurm."""
    cancelled: bool
    """Whether a user's scancel ended it, as far as its head task could tell."""
    given_up: str | None
    """Why nothing continues the run by itself any more."""
    followed: list[str]
    """What it was followed by, a few words each."""
    alerts: Mapping[str, int] = field(default_factory=dict)
    """Alerts by type, those that were held back included."""
    rollbacks: int = 0
    """Times that training went back to an earlier checkpoint."""
    last_entry: float | None = None
    """When rank 0 wrote the newest entry of its ledger, seconds since the epoch."""
    newest_troubles: list[Trouble] = field(default_factory=list)
    """The newest MOST_TROUBLES of its alerts, roll-backs, failed saves and failed ranks, oldest first."""

    @property
    def final(self) -> bool:
        """Whether it has ended, and nothing of its own doing follows."""
        return self.cause is not None and (self.cause not in ("signalled", "bad_node") or self.move == "stop")


def read_attempt(number: int, paths: AttemptPaths, memory: Memory) -> AttemptView:
    """Read an attempt's records.

    Args:
        memory: what has been read of its ledgers before.

    Raises:
        RunDirectoryError: a damaged record.
    """
    process = read_record(paths.process, ProcessRecord) if paths.process.is_file() else None
    outcome = read_record(paths.outcome, Outcome) if paths.outcome.is_file() else None
    first, last = (end or {} for end in read_ends(paths.steps))
    ledger = memory.ledger(paths.events("node-0"))
    told = memory.ledger(paths.events("rank-0"))
    decided: Mapping[str, Any] = next((record for record in reversed(ledger) if record.get("event") == "next"), {})
    restarting = sum(record.get("event") == "restarting" for record in ledger)
    return AttemptView(
        number=number,
        host=process.host if process else None,
        job=process.job if process else None,
        began=process.created if process else None,
        cause=outcome.cause if outcome else None,
        message=outcome.message if outcome else None,
        first_step=whole(first.get("step")),
        last_step=whole(last.get("step")),
        loss=last["loss"] if isinstance(last.get("loss"), float) and math.isfinite(last["loss"]) else None,
        restarts=outcome.restarts if outcome else restarting,
        move=decided.get("move"),
        cancelled=decided.get("ending") == "cancelled",
        given_up=decided.get("given_up"),
        followed=what_followed(ledger),
        alerts=count_alerts(told),
        rollbacks=sum(record.get("event") == "rolled_back" for record in told),
        last_entry=newest_time(told),
        newest_troubles=troubles([*ledger, *told]),
    )


def files_of(paths: AttemptPaths) -> tuple[Path, ...]:
    """What ``read_attempt`` reads."""
    return paths.process, paths.outcome, paths.events("node-0"), paths.events("rank-0"), paths.steps


def newest_time(ledger: Iterable[Mapping[str, Any]]) -> float | None:
    """Of a ledger's entries, seconds since the epoch; None without one. Pure."""
    times = (record.get("time") for record in ledger)
    return max((time for time in times if isinstance(time, int | float)), default=None)


def count_alerts(ledger: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Alerts by type. One that is told of counts those that were held back before it; each start of the ranks counts
    from one again. Pure.
    """
    counts: Counter[str] = Counter()
    before: dict[str, int] = {}
    for record in ledger:
        if record.get("event") == "alert":
            kind, number = str(record.get("type")), whole(record.get("occurrences")) or 1
            counts[kind] += number - before[kind] if 0 < before.get(kind, 0) < number else number
            before[kind] = number
    return dict(counts)


def troubles(ledger: Iterable[Mapping[str, Any]]) -> list[Trouble]:
    """The newest entries that somebody should see, oldest first. Pure."""
    found = [trouble(record) for record in ledger if record.get("event") in TROUBLES]
    return sorted(found, key=lambda one: one.time or 0.0)[-MOST_TROUBLES:]


def trouble(record: Mapping[str, Any]) -> Trouble:
    """An entry of a ledger, of a kind in WORDS, as a person is told of it; facts that it lacks are shown as such."""
    kind, moment = str(record.get("event")), record.get("time")
    return Trouble(
        kind=str(record.get("type")) if kind == "alert" else kind,
        time=moment if isinstance(moment, int | float) else None,
        step=whole(record.get("step", record.get("from_step"))),
        message=WORDS[kind].format_map(defaultdict(lambda: "?", record)),
    )


def whole(value: object) -> int | None:
    """``value`` if it is a step's number."""
    return value if isinstance(value, int) else None


def what_followed(ledger: Iterable[Mapping[str, Any]]) -> list[str]:
    """What an attempt's ledger says of the time after it, in order. Pure."""
    said = ((record.get("event"), record.get("job"), record.get("detail"), record) for record in ledger)
    words = []
    for kind, job, detail, record in said:
        match kind:
            case "requeued":
                words.append(f"job {job} requeued")
            case "successor_queued":
                words.append(f"successor {job} queued")
            case "successor_cancelled":
                words.append(f"successor {job} cancelled" if detail is None else f"successor {job} stays: {detail}")
            case "requeue_refused" | "successor_refused":
                words.append(f"{kind.replace('_', ' ')}: {detail}")
            case "next_phase_put_off":
                words.append(f"next phase put off: {detail}")
            case "next":
                words += decision(record)
    return words


def decision(record: Mapping[str, Any]) -> list[str]:
    """The head task's own word on what follows; none where the acts themselves tell."""
    if record.get("ending") == "cancelled":
        return ["nothing: cancelled by user"]
    if record.get("given_up"):
        return [f"nothing: given up after {record['given_up']}"]
    if record.get("move") == "elsewhere":
        return [f"without {record.get('bad_node')}"]
    return {"stop": ["nothing"], "leave": [f"left to Slurm ({record.get('ending')})"]}.get(str(record.get("move")), [])
