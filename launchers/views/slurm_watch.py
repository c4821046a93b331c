"""Slurm's words on jobs, asked for seldom, by those who look again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from launchers.slurm import JobState, Listing, list_jobs

SECONDS_BETWEEN_SQUEUES = 30.0


@dataclass
class SlurmWatch:
    """Slurm's words on jobs: one squeue for all of them in ``interval``, however many look.

    Args:
        interval: least seconds from the end of one question to the next.
        clock: seconds since the epoch.
    """

    interval: float = SECONDS_BETWEEN_SQUEUES
    clock: Callable[[], float] = time.time
    listing: Listing = field(default_factory=lambda: Listing({}, None))
    asked: float | None = None
    """When it was asked last, seconds since the epoch."""
    _ended: dict[str, JobState] = field(default_factory=dict)
    _asking: threading.Lock = field(default_factory=threading.Lock)

    def due(self) -> bool:
        return self.asked is None or self.clock() - self.asked >= self.interval

    def ask_if_due(self, jobs: Iterable[str]) -> bool:
        """Ask, which may take seconds where the controller is away; whether it was asked. Without jobs nobody is."""
        wanted = list(dict.fromkeys(jobs))
        if not wanted or not self.due() or not self._asking.acquire(blocking=False):
            return False
        try:
            self.listing = list_jobs(wanted, ended=self._ended)
            self._ended = {job: said for job, said in self.listing.states.items() if said.ended}
            self.asked = self.clock()
        finally:
            self._asking.release()
        return True
