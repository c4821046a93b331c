"""The columns of the table of runs, and which of them a terminal has room for."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.text import Text

from launchers.monitor import words
from launchers.monitor.observatory import Board, Sight
from launchers.views.show import sparkline
from launchers.views.standing import State
from launchers.views.tables import COLORS, gate_words

WIDEST_NAME = 40
NARROWEST_NAME = 20
SPARKS = 8


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table of runs."""

    name: str
    width: int
    """Characters."""
    rank: int
    """Columns of the lowest rank are shown in the narrowest terminal, the others as there is room."""
    text: Callable[[Sight, float], str]
    """(run, now in seconds since the epoch) -> what stands there."""
    side: Literal["left", "right"] = "left"

    def cell(self, sight: Sight, now: float, width: int) -> Text:
        """What stands there, in the run's colour, ``width`` characters."""
        shown = words.shortened(words.printable(self.text(sight, now)), width)
        danger = self.name == "!" and words.dangers(sight, now)
        style = "bold red" if danger else "yellow" if self.name == "!" else style_of(sight)
        return Text(shown.rjust(width) if self.side == "right" else shown.ljust(width), style=style)


Fitting = Sequence[tuple[Column, int]]
"""Columns with their widths, characters."""


COLUMNS: Sequence[Column] = (
    Column(name="run", width=NARROWEST_NAME, rank=0, text=lambda sight, now: sight.view.name),
    Column(name="state", width=9, rank=0, text=lambda sight, now: sight.view.standing.state.value),
    Column(name="slurm", width=12, rank=4, text=lambda sight, now: words.slurm_words(sight)),
    Column(name="phase", width=12, rank=2, text=lambda sight, now: phase_of(sight)),
    Column(name="gate", width=7, rank=3, text=lambda sight, now: gate_of(sight)),
    Column(name="try", width=3, rank=2, side="right", text=lambda sight, now: attempts_of(sight)),
    Column(name="last end", width=12, rank=3, text=lambda sight, now: words.end_words(sight)),
    Column(name="step", width=13, rank=0, side="right", text=lambda sight, now: words.step_words(sight)),
    Column(name="left", width=6, rank=0, side="right", text=words.time_left),
    Column(name="loss", width=6, rank=0, side="right", text=lambda sight, now: words.loss_words(sight)),
    Column(name="", width=SPARKS, rank=0, text=lambda sight, now: sparkline(sight.vitals.losses, SPARKS)),
    Column(
        name="tok/s", width=6, rank=0, side="right",
        text=lambda sight, now: words.compact(sight.vitals.tokens_per_second),
    ),
    Column(name="MFU", width=6, rank=3, side="right", text=lambda sight, now: words.percent(sight.mfu)),
    Column(name="wait", width=6, rank=4, side="right", text=lambda sight, now: words.percent(sight.vitals.data_wait)),
    Column(name="saved", width=7, rank=1, side="right", text=words.checkpoint_age),
    Column(name="heard", width=7, rank=1, side="right", text=words.oldest_heartbeat),
    Column(name="!", width=3, rank=0, text=words.alarm),
)  # fmt: skip
"""As they stand from left to right."""


def phase_of(sight: Sight) -> str:
    return sight.view.records.phase if sight.view.records else words.NOTHING


def gate_of(sight: Sight) -> str:
    return (gate_words(sight.view.records) if sight.view.records else "").partition(":")[0] or words.NOTHING


def attempts_of(sight: Sight) -> str:
    return str(len(sight.view.records.attempts)) if sight.view.records else words.NOTHING


def style_of(sight: Sight) -> str:
    """The colour of a run's state."""
    color = COLORS.get(sight.view.standing.state, "red")
    return "dim" if sight.view.standing.state is State.NEW else color


def details_text(sight: Sight, now: float, width: int, chosen: Container[str] | None = None) -> Text:
    """A run in some lines of a terminal ``width`` characters wide; those that are chosen by name, or all."""
    lines = []
    for name, said in words.details(sight, now, width=width):
        if chosen is not None and name not in chosen:
            continue
        danger = name == "alerts" and words.alarm(sight, now)
        line = Text().append(f"{name:<8} ", style="bold")
        line.append(said, style="bold red" if danger else style_of(sight) if name == "state" else "none")
        lines.append(line)
    return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)


def fitting(width: int) -> Fitting:
    """The columns that ``width`` characters have room for, each with its own width; what is left over goes to the
    name. One blank stands between two columns.
    """
    chosen: list[Column] = []
    for column in sorted(COLUMNS, key=lambda one: one.rank):  # stable: within a rank from left to right
        if not column.rank or total([*chosen, column]) <= width:
            chosen.append(column)
    spare = max(0, min(width - total(chosen), WIDEST_NAME - NARROWEST_NAME))
    return [(column, column.width + (spare if column.name == "run" else 0)) for column in COLUMNS if column in chosen]


def total(columns: Sequence[Column]) -> int:
    return sum(column.width + 1 for column in columns) - 1


def header_of(columns: Fitting) -> Text:
    """The columns' names, over the columns."""
    titles = (column.name.rjust(width) if column.side == "right" else column.name for column, width in columns)
    cells = [title.ljust(width) for title, (_, width) in zip(titles, columns, strict=True)]
    return Text(" ".join(cells), style="bold", no_wrap=True)


def rows_of(board: Board, columns: Fitting) -> dict[str, Text]:
    """A run's directory -> its row, one line: a terminal draws it much faster than its cells one by one."""
    return {sight.view.directory: row_of(sight, board.now, columns) for sight in board.sights}


def row_of(sight: Sight, now: float, columns: Fitting) -> Text:
    cells = [column.cell(sight, now, width) for column, width in columns]
    return Text(" ", no_wrap=True).join(cells)
