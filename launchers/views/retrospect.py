"""All that a report tells of one run: how it stands, where its time went, its curves, alerts and gates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from encdec.files import RunPaths
from encdec.gates import Evidence
from encdec.training.run_config import RunConfig, read_run_config
from launchers.bookkeeping.accounting import account, lost_steps
from launchers.bookkeeping.goodput import Circumstances, measure, predict
from launchers.bookkeeping.ledger import STARTING, Ledger, Part, sum_parts
from launchers.bookkeeping.run_story import AttemptStory, Event, RunStory, Steps, is_number, read_story
from launchers.views.charts import Curve, Note
from launchers.views.overview import RunRecords, RunView, look
from launchers.views.standing import State

ALIVE = frozenset({State.RUNNING, State.UNKNOWN})


@dataclass(frozen=True, kw_only=True)
class AttemptAccount:
    """One attempt and its time."""

    story: AttemptStory
    began: float
    """Seconds since the epoch."""
    ended: float
    parts: Mapping[Part, float]
    steps: int
    """That count."""
    lost_steps: int
    cause: str
    """How it ended; empty while it lives."""
    message: str


@dataclass(frozen=True, kw_only=True)
class CauseAccount:
    """All that one cause has cost."""

    cause: str
    """Of interruptions; or that the run had to start at all."""
    times: int
    lost_steps: int
    lost_seconds: float
    queue_seconds: float
    start_up_seconds: float
    down_seconds: float

    @property
    def seconds(self) -> float:
        return self.lost_seconds + self.queue_seconds + self.start_up_seconds + self.down_seconds


@dataclass(frozen=True, kw_only=True)
class Retrospect:
    """One run, looked back upon."""

    view: RunView
    run: RunConfig
    story: RunStory
    ledger: Ledger
    lost: Sequence[np.ndarray]
    """For each attempt which of its step records are lost, bool [N]."""
    circumstances: Circumstances | None
    """What the formula for the ETTR is fed with; None before the first step."""
    planned_ettr: float | None
    """What the plan expected, time in the queue not counted; None where it did not say."""

    @property
    def records(self) -> RunRecords:
        assert self.view.records is not None, "a damaged run has no retrospect"
        return self.view.records

    @property
    def predicted_ettr(self) -> float | None:
        return None if self.circumstances is None else predict(self.circumstances)

    @property
    def attempts(self) -> list[AttemptAccount]:
        """Oldest first."""
        return list(self._attempts())

    def _attempts(self) -> Iterator[AttemptAccount]:
        alive = self.view.standing.state in ALIVE
        for attempt, lost in zip(self.story.attempts, self.lost, strict=True):
            spans = [span for span in self.ledger.spans if span.attempt == attempt.number]
            lives = alive and attempt is self.story.attempts[-1] and attempt.outcome is None
            yield AttemptAccount(
                story=attempt,
                began=spans[0].began if spans else attempt.began,
                ended=spans[-1].ended if spans else attempt.began,
                parts=sum_parts(spans),
                steps=int((~lost).sum()),
                lost_steps=int(lost.sum()),
                cause="" if lives else attempt.cause,
                message=attempt.outcome.message if attempt.outcome else "",
            )

    @property
    def causes(self) -> list[CauseAccount]:
        """The most expensive first."""
        parts = {cause: sum_parts(spans) for cause, spans in grouped(self.ledger.spans).items() if cause}
        ends = grouped(self.ledger.interruptions)
        found = [
            CauseAccount(
                cause=cause,
                times=len(ends.get(cause, [])) or 1,
                lost_steps=sum(each.lost_steps for each in ends.get(cause, [])),
                lost_seconds=sum(each.lost_seconds for each in ends.get(cause, [])),
                queue_seconds=parts[cause][Part.QUEUE] if cause in parts else 0.0,
                start_up_seconds=sum(parts[cause][part] for part in STARTING) if cause in parts else 0.0,
                down_seconds=parts[cause][Part.DOWN] if cause in parts else 0.0,
            )
            for cause in {**parts, **ends}
        ]
        return sorted(found, key=lambda each: -each.seconds)

    @property
    def alerts(self) -> list[tuple[int, Event]]:
        """(attempt, alert), in order."""
        return self._told("alert")

    @property
    def turns(self) -> list[tuple[int, Event]]:
        """(attempt, event) of closed gates, roll-backs, failed saves and early stops, in order."""
        return self._told("gate_not_passed", "rolled_back", "save_failed", "stopped_early")

    def _told(self, *kinds: str) -> list[tuple[int, Event]]:
        return [
            (attempt.number, event)
            for attempt in self.story.attempts
            for event in attempt.events
            if event["event"] in kinds
        ]

    @property
    def evidence(self) -> Sequence[Evidence]:
        """The verdicts of the phase's gates; none before they are judged."""
        return self.records.gate.evidence if self.records.gate else ()

    @property
    def counted(self) -> Steps:
        """The steps that count, by column, in order."""
        return self._steps(lost=False)

    def _steps(self, *, lost: bool) -> Steps:
        tables = [
            {name: column[rows == lost] for name, column in attempt.steps.items()}
            for attempt, rows in zip(self.story.attempts, self.lost, strict=True)
        ]
        names = tables[0] if tables else ("step", "time", "tokens_seen", "loss", "tokens_per_second")
        return {name: np.concatenate([np.zeros(0), *(table[name] for table in tables)]) for name in names}

    def curves(self) -> list[Curve]:
        """What is drawn over steps."""
        counted, lost = self._steps(lost=False), self._steps(lost=True)
        wanted = (
            ("loss", "Loss", "nats a target token", False),
            ("learning_rate", "Learning rate", "", True),
            ("grad_norm", "Gradient norm", "before clipping", False),
            ("tokens_per_second", "Throughput", "tokens/s", True),
            ("memory_gb", "Memory of rank 0", "GB", True),
            ("data_seconds", "Wait for data", "s a step", True),
        )
        nothing = np.zeros(0)
        return [
            Curve(
                title=title, unit=unit, from_zero=from_zero, step=counted["step"], value=counted.get(name, nothing),
                lost_step=lost["step"], lost_value=lost.get(name, nothing),
            )
            for name, title, unit, from_zero in wanted
        ]  # fmt: skip

    def starts(self) -> list[Note]:
        """Where ranks began again, by the first step of each start but the first."""
        found = []
        for attempt in self.story.attempts:
            restarts = attempt.steps["restart"]
            for restart in np.unique(restarts):
                first = attempt.steps["step"][np.flatnonzero(restarts == restart)[0]]
                words = f", restart {int(restart)} in place" if restart else ""
                found.append(Note(float(first), f"attempt {attempt.number}{words}: from step {int(first)}"))
        return found[1:]


class Caused(Protocol):
    """A span or an interruption."""

    @property
    def cause(self) -> str:
        """What it is due to."""


Costly = TypeVar("Costly", bound=Caused)


def grouped(items: Iterable[Costly]) -> dict[str, list[Costly]]:
    """``items`` by their causes."""
    groups: dict[str, list[Costly]] = {}
    for item in items:
        groups.setdefault(item.cause, []).append(item)
    return groups


def look_back(paths: RunPaths, *, now: float) -> Retrospect:
    """Read a run; Slurm is asked once, about its jobs, if it has any that may live.

    Args:
        now: seconds since the epoch: until when a run waits that waits.

    Raises:
        RunDirectoryError: damaged, or never submitted.
    """
    [view] = look([paths], forgiving=False)
    run = read_run_config(paths)
    story = read_story(paths, run)
    over = view.standing.state not in ALIVE
    ledger = account(story, over=over, now=now if view.standing.state is State.PENDING else None)
    return Retrospect(
        view=view, run=run, story=story, ledger=ledger, lost=lost_steps(story, over=over),
        circumstances=measure(ledger, story), planned_ettr=planned_ettr(paths),
    )  # fmt: skip


def planned_ettr(paths: RunPaths) -> float | None:
    """The ETTR in the forecast of plan.json; None where it has none."""
    try:
        value = json.loads(paths.plan.read_bytes())["forecast"]["ettr"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if is_number(value) else None


def document(found: Retrospect) -> dict[str, Any]:
    """A report for programs. The keys stay; times are seconds since the epoch, what is not known is null."""
    ledger, view = found.ledger, found.view
    told = {
        "name": view.name,
        "directory": view.directory,
        "state": view.standing.state,
        "words": view.standing.words,
        "phase": found.records.phase,
        "num_train_steps": found.records.total_steps,
        "steps": ledger.steps,
        "lost_steps": ledger.lost_steps,
        "began": ledger.began,
        "ended": ledger.ended,
        "wall_seconds": ledger.wall,
        "productive_seconds": ledger.productive,
        "ettr": ledger.ettr,
        "ettr_while_running": ledger.ettr_while_running,
        "predicted_ettr": found.predicted_ettr,
        "planned_ettr": found.planned_ettr,
        "prediction_from": asdict(found.circumstances) if found.circumstances else None,
        "parts": ledger.totals,
        "causes": [{**asdict(cause), "seconds": cause.seconds} for cause in found.causes],
        "interruptions": [asdict(each) for each in ledger.interruptions],
        "attempts": [
            {
                "number": each.story.number, "job": each.story.job, "host": each.story.host, "began": each.began,
                "ended": each.ended, "cause": each.cause or None, "message": each.message, "steps": each.steps,
                "lost_steps": each.lost_steps, "parts": each.parts,
            }
            for each in found.attempts
        ],
        "alerts": [{**event, "attempt": attempt} for attempt, event in found.alerts],
        "turns": [{**event, "attempt": attempt} for attempt, event in found.turns],
        "gate": asdict(found.records.gate) if found.records.gate else None,
    }  # fmt: skip
    return finite(told)


def finite(value: Any) -> Any:
    """``value`` with None for every number that JSON has no word for."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): finite(each) for key, each in value.items()}
        case list() | tuple():
            return [finite(each) for each in value]
    return value


def as_json(found: Retrospect) -> str:
    return json.dumps(document(found), indent=2, allow_nan=False)
