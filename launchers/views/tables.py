"""How runs stand, for a person as tables and for a program as plain values."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from launchers.views.history import AttemptView, Trouble
from launchers.views.overview import RunRecords, RunView
from launchers.views.progress import make_console
from launchers.views.standing import State

COLORS = {
    State.COMPLETE: "green",
    State.RUNNING: "cyan",
    State.PENDING: "cyan",
    State.NEW: "none",
    State.CANCELLED: "yellow",
    State.STOPPED: "yellow",
}
"""Red, where there is none."""
UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
COLUMNS_OF_A_FILE = 300
"""Without a terminal every run has its line, however long."""


def print_table(table: Table) -> None:
    console = make_console()
    if not console.is_terminal:
        console.width = COLUMNS_OF_A_FILE
    console.print(table)


def table_with(*names: str) -> Table:
    """A table without lines, to be read and cut by columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in ("attempts", "step", "loss") else "left")
    return table


def runs_table(views: Sequence[RunView], now: float) -> Table:
    """One line a run."""
    table = table_with("run", "phase", "state", "gate", "attempts", "step", "loss", "heard of", "alerts")
    for view in views:
        color, records = COLORS.get(view.standing.state, "red"), view.records
        if records is None:
            table.add_row(view.name, "", view.standing.words, style=color)
            continue
        position = records.position
        table.add_row(
            view.name,
            records.phase,
            view.standing.words + (", continue with submit" if view.next_command and records.attempts else ""),
            gate_words(records),
            str(len(records.attempts)),
            f"{(position.last_step if position else 0) or 0:,} of {records.total_steps:,}",
            f"{position.loss:.4f}" if position and position.loss is not None else "",
            heard_of(view, now),
            alert_words(records.attempts),
            style=color,
        )
    return table


def gate_words(records: RunRecords) -> str:
    """The verdict on a phase; the gates that closed are named."""
    if records.gate is None:
        return ""
    return "passed" if records.gate.passed else f"closed: {', '.join(item.gate for item in records.gate.failures)}"


def alert_words(attempts: Sequence[AttemptView]) -> str:
    """How many alerts of each type there were, and how often training went back."""
    counts: Counter[str] = Counter()
    for attempt in attempts:
        counts.update(attempt.alerts)
    words = [f"{count:,} {kind}" for kind, count in counts.most_common()]
    rollbacks = sum(attempt.rollbacks for attempt in attempts)
    return ", ".join(words + ([f"rolled back {rollbacks}x"] if rollbacks else []))


def trouble_line(trouble: Trouble, now: float) -> str:
    """``4 min ago, step 120, loss_spike: ...``, as far as it is known."""
    when = [f"{age(now - trouble.time)} ago"] if trouble.time is not None else []
    where = [f"step {trouble.step:,}"] if trouble.step is not None else []
    return f"{', '.join([*when, *where, trouble.kind])}: {trouble.message}"


def heard_of(view: RunView, now: float) -> str:
    """The newest sign of life and its age."""
    records = view.records
    if records is None:
        return ""
    signs = {"heartbeat": records.heartbeat, records.checkpoint: records.checkpoint_time}
    moment, what = max(((moment, what) for what, moment in signs.items() if moment is not None), default=(None, None))
    return f"{what} {age(now - moment)} ago" if moment is not None else ""


def age(seconds: float) -> str:
    """In its largest unit."""
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= size), UNITS[-1])
    return f"{max(0, int(seconds / size))} {unit}"


def attempts_table(view: RunView) -> Table:
    """One line an attempt."""
    table = table_with("attempt", "job", "host", "ended", "steps", "restarts", "followed by")
    attempts = view.records.attempts if view.records else []
    for attempt in attempts:
        lives = attempt is attempts[-1] and view.standing.state in (State.RUNNING, State.UNKNOWN)
        table.add_row(
            str(attempt.number),
            attempt.job or "",
            attempt.host or "",
            attempt.cause or ("not yet" if lives else "without a word"),
            steps_of(attempt),
            str(attempt.restarts),
            "; ".join(attempt.followed),
        )
    return table


def steps_of(attempt: AttemptView) -> str:
    return "" if attempt.last_step is None else f"{attempt.first_step}-{attempt.last_step}"


def show_runs(views: Sequence[RunView], *, verbose: bool) -> None:
    """Print the runs; if ``verbose``, each with its attempts and what to type next."""
    if not verbose:
        print_table(runs_table(views, time.time()))
        return
    for view in views:
        print_table(runs_table([view], time.time()))
        print_table(attempts_table(view))
        newest = view.records.newest if view.records else None
        for trouble in newest.newest_troubles if newest else ():
            make_console().print(trouble_line(trouble, time.time()))
        facts = {"said": newest.message if newest else None, "next": view.next_command, "directory": view.directory}
        for name, fact in facts.items():
            if fact:
                make_console().print(f"{name}: {fact}")


def document(view: RunView) -> dict[str, Any]:
    """A run for programs. The keys stay; a value that is not known is null, times are seconds since the epoch."""
    records = view.records
    position = records.position if records else None
    job = view.job and view.standing.job and {"id": view.standing.job, **asdict(view.job)}
    return {
        "name": view.name,
        "directory": view.directory,
        "state": view.standing.state,
        "words": view.standing.words,
        "phase": records.phase if records else None,
        "job": job or None,
        "host": records.host if records else None,
        "step": position.last_step if position else None,
        "num_train_steps": records.total_steps if records else None,
        "loss": position.loss if position else None,
        "heartbeat": records.heartbeat if records else None,
        "heartbeats": dict(records.heartbeats) if records else {},
        "checkpoint": records.checkpoint if records else None,
        "checkpoint_time": records.checkpoint_time if records else None,
        "gate": asdict(records.gate) if records and records.gate else None,
        "next": view.next_command,
        "attempts": [asdict(attempt) for attempt in records.attempts] if records else [],
    }
