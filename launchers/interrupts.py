"""Ctrl-C while a job is started and followed: counted, to be acted upon where the program can."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType


class Interrupts:
    """Counts SIGINT instead of raising KeyboardInterrupt (main thread only)."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._count)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        signal.signal(signal.SIGINT, self._before)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """A Ctrl-C waits until the end; what is started meanwhile never gets the terminal's, for a mask is inherited."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
