"""Spans of time as bars: what lies where on a line of per cents. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from launchers.bookkeeping.ledger import GROUPS, Ledger, Part, Span
from launchers.views.charts import round_step
from launchers.views.units import LARGE, duration

GROUP_OF = {part: group for group, parts in GROUPS.items() for part in parts}
MOST_BARS = 80
"""In one row: more than a screen shows apart. The narrowest go first."""


@dataclass(frozen=True)
class Bar:
    """One piece of a row."""

    group: str
    """A key of launchers.bookkeeping.ledger.GROUPS."""
    left: float
    """Per cent of the wall time."""
    width: float
    seconds: float


def bars(spans: Iterable[Span], ledger: Ledger) -> list[Bar]:
    """A row's bars: neighbours of one group are one. What is lost of a stretch of training is drawn at its end, where
    it lies; what lies scattered in it, and is small, is no bar of its own.
    """
    pieces = [piece for span in spans for piece in pieces_of(span)]
    found = []
    for group, run in groupby(pieces, key=lambda piece: piece[2]):
        row = list(run)
        began, ended = row[0][0], row[-1][1]
        left, width = (100 * part / ledger.wall for part in (began - ledger.began, ended - began))
        found.append(Bar(group, left, width, ended - began))
    narrowest = sorted((bar.width for bar in found), reverse=True)[:MOST_BARS][-1:] or [0.0]
    return [bar for bar in found if bar.width >= narrowest[0]][:MOST_BARS]


def pieces_of(span: Span) -> list[tuple[float, float, str]]:
    """(began, ended, group) of a span: one, or two where a part of its training was lost."""
    lost = span.seconds.get(Part.LOST, 0.0)
    others: dict[Part, float] = {part: seconds for part, seconds in span.seconds.items() if part is not Part.LOST}
    turn = span.ended - lost
    main: Part = max(others, key=lambda part: others[part]) if others else Part.LOST
    pieces = [(span.began, turn, GROUP_OF[main]), (turn, span.ended, GROUP_OF[Part.LOST])]
    return [piece for piece in pieces if piece[1] > piece[0]]


def ticks(ledger: Ledger, most: int = 4) -> list[tuple[float, str]]:
    """(per cent, time since the beginning) at round times."""
    size = next((size for size, _ in LARGE if ledger.wall >= 2 * size), LARGE[-1][0])
    if ledger.wall <= 0:
        return []
    step = size * round_step(ledger.wall / size / most)
    return [
        (100 * number * step / ledger.wall, duration(number * step)) for number in range(int(ledger.wall / step) + 1)
    ]


def percent(moment: float, ledger: Ledger) -> float:
    """Where a moment lies, 0 to 100."""
    return min(100.0, max(0.0, 100 * (moment - ledger.began) / ledger.wall)) if ledger.wall > 0 else 0.0
