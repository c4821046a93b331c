"""What the attempts of a run did, one after the other, as their records say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from encdec.files import AttemptPaths
from encdec.records import Outcome, ProcessRecord, read_ends, read_json_lines, read_record


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

    @property
    def final(self) -> bool:
        """Whether it has ended, and nothing of its own doing follows."""
        return self.cause is not None and (self.cause not in ("signalled", "bad_node") or self.move == "stop")


def read_attempt(number: int, paths: AttemptPaths) -> AttemptView:
    """Read an attempt's records.

    Raises:
        RunDirectoryError: a damaged record.
    """
    process = read_record(paths.process, ProcessRecord) if paths.process.is_file() else None
    outcome = read_record(paths.outcome, Outcome) if paths.outcome.is_file() else None
    first, last = (end or {} for end in read_ends(paths.steps))
    ledger = list(read_json_lines(paths.events("node-0")))
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
