"""One checkpoint on its way to storage, in a thread beside training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from encdec.errors import EncdecError


@dataclass(frozen=True)
class Saved:
    """One committed checkpoint and what it took."""

    step: int
    checkpoint_id: str
    seconds: float
    """From the call to the commit."""
    blocking_seconds: float
    """Part of it for which training stood still."""


class Flight:
    """Runs ``commit`` in a thread and keeps its error.

    Args:
        step: whose checkpoint this is.
        began: ``time.perf_counter()`` at the call that asked for it.
        commit: commits it. Never touches the default process group, which is the training loop's.
        tidy: what is left to do once it is committed; the same holds.
    """

    def __init__(self, step: int, began: float, commit: Callable[[], None], tidy: Callable[[], None]) -> None:
        self.step = step
        self._began, self._commit, self._tidy = began, commit, tidy
        self._error: BaseException | None = None
        self._ended = 0.0
        self._thread = threading.Thread(target=self._run, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        self._blocking_seconds = time.perf_counter() - began

    def _run(self) -> None:
        try:
            self._commit()
            self._ended = time.perf_counter()
            self._tidy()
        except BaseException as error:  # it is raised where training waits for it
            self._error = error

    @property
    def writing(self) -> bool:
        return self._thread.is_alive()

    @property
    def crashed(self) -> bool:
        """Whether it ended on this rank alone: by an error that the ranks did not share."""
        return not self.writing and self._error is not None and not isinstance(self._error, OSError | EncdecError)

    def wait(self, timeout: float | None = None) -> Saved:
        """Wait for the end, and for training's part in it.

        Raises:
            TimeoutError: it did not end within ``timeout`` seconds.
            OSError, EncdecError: it failed, on every rank; anything else is this rank's own crash.
        """
        waits_from = time.perf_counter()
        self._thread.join(timeout)
        waited = time.perf_counter() - waits_from
        if self.writing:
            raise TimeoutError(f"checkpoint step-{self.step} is still being written")
        if self._error is not None:
            raise self._error
        seconds = self._ended - self._began
        return Saved(self.step, f"step-{self.step}", seconds, min(seconds, self._blocking_seconds + waited))
