"""Curves over steps as inline SVG: static, small, coloured by the page's own style sheet, every word escaped. Pure.

Classes that the style sheet knows: band, line, lost (computed again), start (of ranks), alert, grid, tick.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np

from launchers.views.downsample import envelope
from launchers.views.units import compact

WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 14, 22
"""Margins around the plot; units of the view box, about a pixel each."""
BUCKETS = 300
LOST_BUCKETS = 100
LOG_RATIO = 30.0
"""A positive curve whose highest value is more than so many times its lowest has a logarithmic axis."""
MOST_MARKS = 60
"""Of one kind: more would hide the curve."""


@dataclass(frozen=True)
class Note:
    """Something that happened at a step."""

    step: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one chart shows."""

    title: str
    unit: str
    step: np.ndarray
    """[N], of the steps that count."""
    value: np.ndarray
    """[N]"""
    lost_step: np.ndarray
    """[M], of steps that were computed again."""
    lost_value: np.ndarray
    """[M]"""
    from_zero: bool = False
    """Whether the axis begins at 0, and is linear."""

    @property
    def not_finite(self) -> int:
        """Values that are no finite numbers, and so are in no chart."""
        return int((~np.isfinite(self.value)).sum())


@dataclass(frozen=True)
class Axis:
    """From values to a place between ``begin`` and ``end`` of the view box."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Where ``values`` lie, view box units."""
        low, high, values = (self._scale(each) for each in (self.low, self.high, values))
        share = (values - low) / (high - low)
        return self.begin + share * (self.end - self.begin)

    def _scale(self, values: np.ndarray | float) -> np.ndarray:
        return np.log10(values) if self.log else np.asarray(values, dtype=float)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values to be named, at most about ``most``."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = max(1, math.ceil(len(decades) / most))
            found = [10.0**d for d in decades[::every] if self.low <= 10.0**d <= self.high]
            if len(found) >= 2:
                return found
            return [m * 10.0**d for d in decades for m in (1, 2, 5) if self.low <= m * 10.0**d <= self.high]
        step = round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (or 0.5, 0.2, ...) that is at least ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= least * (1 - 1e-9))


def value_axis(values: np.ndarray, *, from_zero: bool) -> Axis:
    """Upward axis for finite ``values`` [N], N > 0."""
    low, high = float(values.min()), float(values.max())
    if not from_zero and low > 0 and high / low > LOG_RATIO:
        return Axis(low, high, HEIGHT - BOTTOM, TOP, log=True)
    low = min(0.0, low) if from_zero else low
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return Axis(low if from_zero and low == 0 else low - room, high + room, HEIGHT - BOTTOM, TOP)


def chart(curve: Curve, *, starts: Sequence[Note] = (), alerts: Sequence[Note] = ()) -> str:
    """One curve as an ``<svg>`` element; of many steps the lowest, mean and highest of each of BUCKETS parts.

    Args:
        starts: of ranks, after interruptions.
        alerts: marked above the curve.
    """
    root = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img"})
    ElementTree.SubElement(root, "title").text = f"{curve.title} by step"
    counts = envelope(curve.step, curve.value, BUCKETS)
    lost = envelope(curve.lost_step, curve.lost_value, LOST_BUCKETS)
    seen = np.concatenate([counts.low, counts.high, lost.low, lost.high])
    if not len(seen):
        _text(root, WIDTH / 2, HEIGHT / 2, "nothing was measured", anchor="middle")
        return ElementTree.tostring(root, encoding="unicode")
    steps = np.concatenate([curve.step, curve.lost_step])  # all of them: a bucket's mean lies inside
    across = Axis(float(steps.min()), max(float(steps.max()), float(steps.min()) + 1), LEFT, WIDTH - RIGHT)
    upward = value_axis(seen, from_zero=curve.from_zero)
    _grid(root, across, upward)
    for note in _few(starts, across):
        where = f"M{float(across.place(note.step)):.1f} {TOP}V{HEIGHT - BOTTOM}"
        line = ElementTree.SubElement(root, "path", {"class": "start", "d": where})
        ElementTree.SubElement(line, "title").text = note.text
    if len(lost.x):
        _dots(root, across.place(lost.x), upward.place(lost.mean))
    if len(counts.x):
        x, low, mean, high = across.place(counts.x), *(upward.place(each) for each in counts[1:])
        if np.any(low != high):
            there, back = _points(x, high), _points(x[::-1], low[::-1])
            ElementTree.SubElement(root, "path", {"class": "band", "d": f"M{there}L{back}Z"})
        ElementTree.SubElement(root, "path", {"class": "line", "d": f"M{_points(x, mean)}"})
    for note in _few(alerts, across):
        x0 = float(across.place(note.step))
        mark = ElementTree.SubElement(root, "path", {"class": "alert", "d": f"M{x0 - 4:.1f} 2h8l-4 8z"})
        ElementTree.SubElement(mark, "title").text = note.text
    return ElementTree.tostring(root, encoding="unicode")


def _few(notes: Iterable[Note], across: Axis) -> list[Note]:
    """Those on the axis; of many some, evenly."""
    inside = [note for note in notes if across.low <= note.step <= across.high]
    return inside[:: max(1, math.ceil(len(inside) / MOST_MARKS))]


def _grid(root: ElementTree.Element, across: Axis, upward: Axis) -> None:
    for value in upward.ticks():
        y = float(upward.place(value))
        ElementTree.SubElement(root, "path", {"class": "grid", "d": f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}"})
        _text(root, LEFT - 5, y + 3.5, compact(value), anchor="end")
    for value in across.ticks(6):
        if value == int(value):
            _text(root, float(across.place(value)), HEIGHT - 7, compact(value), anchor="middle")


def _text(root: ElementTree.Element, x: float, y: float, words: str, *, anchor: str) -> None:
    place = {"class": "tick", "x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ElementTree.SubElement(root, "text", place).text = words


def _dots(root: ElementTree.Element, x: np.ndarray, y: np.ndarray) -> None:
    marks = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True))
    dots = ElementTree.SubElement(root, "path", {"class": "lost", "d": marks})
    ElementTree.SubElement(dots, "title").text = "computed again later"


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
