"""How a run fares, from its step records alone: where it is, how fast, how long it will take, what its loss did."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from encdec.files import AttemptPaths, RunPaths
from encdec.records import is_step, records_of
from launchers.views.growing_files import GrowingFile, records_between

NEWEST_STEPS = 50
"""Over which the time that is left, the throughput and the wait for data are measured."""
BYTES_OF_THE_NEWEST = 1 << 16
"""Read from the end of a file of step records at the first look: more than NEWEST_STEPS of them."""
PLACES_LOOKED_AT = 64
"""Of a file of step records, for the curve of its loss."""
CURVE_POINTS = 256
"""At which a curve is thinned out to every other point."""


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """How a run fares. None, where no step says so."""

    step: int | None = None
    time: float | None = None
    """When that step was done, seconds since the epoch."""
    loss: float | None = None
    """Of that step, nats; None, too, if it is no number."""
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens_seen: int | None = None
    memory_gb: float | None = None
    tokens_per_second: float | None = None
    """Raw corpus tokens over the time of the newest steps, all ranks together."""
    step_seconds: float | None = None
    """Mean of the newest steps."""
    data_wait: float | None = None
    """Share of the newest steps' time that rank 0 waited for data."""
    losses: tuple[float, ...] = ()
    """Nats, over all attempts, oldest first; of a long run some of its steps, evenly spaced."""

    def seconds_left(self, total_steps: int) -> float | None:
        """Until the last step at the pace of the newest ones; saves and evaluations come on top."""
        if self.step is None or self.step_seconds is None:
            return None
        return max(0, total_steps - self.step) * self.step_seconds


class Curve:
    """Losses by step, thinned out as they become many; what is computed again replaces what was computed before."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []
        self._stride = 1

    def add(self, step: int, loss: float) -> None:
        while self._points and self._points[-1][0] >= step:
            self._points.pop()
        if self._points and step - self._points[-1][0] < self._stride:
            return
        self._points.append((step, loss))
        if len(self._points) > CURVE_POINTS:
            self._points = self._points[::2]
            self._stride = max(2, (self._points[-1][0] - self._points[0][0]) // (len(self._points) - 1))

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(loss for _, loss in self._points)


class Pulse:
    """Reads the step records of a run, attempt after attempt; each look reads what is new.

    Args:
        paths: the run directory.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._curve = Curve()
        self._newest: deque[Mapping[str, Any]] = deque(maxlen=NEWEST_STEPS)
        self._attempt = -1
        self._file: GrowingFile | None = None

    @property
    def bytes_read(self) -> int:
        """Of the newest attempt's records, over all looks but for the curve's first."""
        return self._file.bytes_read if self._file else 0

    def look(self, attempts: Iterable[int]) -> Vitals:
        """Read on.

        Args:
            attempts: numbers of all attempts, ascending.
        """
        new = [number for number in attempts if number > self._attempt]
        if new:
            self._take(self._fresh())  # the last words of the attempt before
        stepped = [number for number in new if has_steps(self._paths.attempt(number))]
        for number in new:
            if stepped and number < stepped[-1]:
                self._draw_curve(number)  # all that is of interest of one that another has gone on from
            else:
                self._take(self._fresh())  # while the newest attempt has no step, the one before says how the run fares
                self._begin(number)
        self._take(self._fresh())
        return self._vitals()

    def _begin(self, number: int) -> None:
        self._draw_curve(number)
        self._file = GrowingFile(self._paths.attempt(number).steps, last_bytes=BYTES_OF_THE_NEWEST)

    def _draw_curve(self, number: int) -> None:
        self._attempt, steps = number, self._paths.attempt(number).steps
        if steps.is_file():
            for record in filter(is_step, records_between(steps, PLACES_LOOKED_AT)):
                self._add_to_curve(record)

    def _fresh(self) -> Iterator[dict[str, Any]]:
        return filter(is_step, records_of(self._file.fresh())) if self._file else iter(())

    def _take(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            self._newest.append(record)
            self._add_to_curve(record)

    def _add_to_curve(self, record: Mapping[str, Any]) -> None:
        if math.isfinite(record["loss"]):
            self._curve.add(record["step"], record["loss"])

    def _vitals(self) -> Vitals:
        if not self._newest:
            return Vitals()
        newest = self._newest[-1]
        seconds = sum(record["step_seconds"] for record in self._newest)
        tokens = sum(record["tokens_per_second"] * record["step_seconds"] for record in self._newest)
        return Vitals(
            step=newest["step"],
            time=newest["time"],
            loss=finite(newest["loss"]),
            grad_norm=finite(newest["grad_norm"]),
            learning_rate=newest["learning_rate"],
            tokens_seen=newest["tokens_seen"],
            memory_gb=newest["memory_gb"],
            tokens_per_second=finite(tokens / seconds) if seconds > 0 else None,
            step_seconds=finite(seconds / len(self._newest)),
            data_wait=sum(record["data_seconds"] for record in self._newest) / seconds if seconds > 0 else None,
            losses=self._curve.losses,
        )


def has_steps(attempt: AttemptPaths) -> bool:
    try:
        return attempt.steps.stat().st_size > 0
    except FileNotFoundError:
        return False


def finite(value: float) -> float | None:
    """``value`` if it is a finite number."""
    return value if math.isfinite(value) else None
