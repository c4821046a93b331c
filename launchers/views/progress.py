"""Follows one attempt's step records: a live line on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from rich.console import Console

from encdec.files import AttemptPaths
from encdec.records import is_step, records_of
from launchers.views.growing_files import GrowingFile

SECONDS_BETWEEN_LINES = 5.0
"""Without a terminal."""


def make_console() -> Console:
    """Shows paths as they are: brackets in them are no markup, colons no emoji."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())


class Progress:
    """Reads what rank 0 has recorded since the last look, and shows it.

    Args:
        attempt: the attempt's files.
        total_steps: steps at which the run is complete.
    """

    def __init__(self, attempt: AttemptPaths, total_steps: int) -> None:
        self._total = total_steps
        self._steps = GrowingFile(attempt.steps)
        self._latest: dict[str, Any] | None = None
        self._seconds: deque[float] = deque(maxlen=50)
        self._next_line = 0.0
        self._said = -1
        self._console = make_console()
        self._status = self._console.status("starting") if sys.stdout.isatty() else None
        if self._status:
            self._status.start()

    def refresh(self) -> None:
        """Read what is new and show it."""
        for record in filter(is_step, records_of(self._steps.fresh())):
            self._take(record)
        if self._latest is not None:
            self._show(self._latest)

    def _take(self, record: dict[str, Any]) -> None:
        if self._latest and record["restart"] > self._latest["restart"]:
            self.say(f"a rank died; started again in place, continuing with step {record['step']}")
        self._latest = record
        self._seconds.append(record["step_seconds"])

    def _show(self, record: dict[str, Any]) -> None:
        step = record["step"]
        left = (self._total - step) * sum(self._seconds) / len(self._seconds)
        line = f"step {step}/{self._total}  loss {record['loss']:.4f}  "
        line += f"{record['tokens_per_second']:,.0f} tokens/s  ETA {left:.0f} s"
        if self._status:
            self._status.update(line)
        elif step != self._said and (time.monotonic() >= self._next_line or step == self._total):
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self._said = step
            self._console.print(line)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text)

    def close(self) -> None:
        if self._status:
            self._status.stop()
