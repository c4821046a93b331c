"""Requests to stop or save, as flags that the trainer reads at step boundaries. Handlers do nothing else.

SIGUSR2 (a cluster's warning), SIGTERM (preemption) and SIGINT (Ctrl-C) ask for the same: finish the step, save, leave.
They may come twice, and not to every rank: the ranks agree through the reduction that each step does anyway.
"""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import NamedTuple

from encdec import distributed
from encdec.files import RunPaths

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
SECONDS_BETWEEN_LOOKS = 1.0
"""How often rank 0 looks for a control file: shared storage is asked neither at every step nor by every rank."""


class Wishes(NamedTuple):
    """What is asked for: seen by one rank, or by any of them once the ranks have agreed."""

    signalled: bool
    """A signal: finish the step, save, leave."""
    stop: bool
    """The control file STOP: the same."""
    save: bool
    """The control file SAVE: save and go on."""


class Requests:
    """What this rank has been asked to do.

    Args:
        paths: the run directory whose ``control/`` files rank 0 looks for, or None to heed signals only.
    """

    def __init__(self, paths: RunPaths | None) -> None:
        self._paths = paths
        self._next_look = 0.0
        self.signal_name: str | None = None

    def listen(self) -> Requests:
        """Install the handlers (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def stop_asked(self) -> bool:
        """Whether this rank should stop what takes long; from any thread."""
        wishes = self.look()
        return wishes.signalled or wishes.stop

    def look(self) -> Wishes:
        """What this rank sees now; a save request is taken away once seen."""
        stop = save = False
        if self._paths is not None and distributed.rank() == 0 and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
            stop = self._paths.stop_request.exists()
            save = self._paths.save_request.exists()
            if save:
                self._paths.save_request.unlink(missing_ok=True)
        return Wishes(signalled=self.signal_name is not None, stop=stop, save=save)
