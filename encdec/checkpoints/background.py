"""Copies of committed checkpoints to a mirror while training goes on: one at a time, never waited for."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from encdec.checkpoints.mirror import Copied, Mirror

log = logging.getLogger("encdec.train")
NICENESS = 10
"""Of the copying thread, above the process's own: training goes first."""


class Report(Protocol):
    """Takes entries for the ledger, from any thread."""

    def __call__(self, kind: str, **facts: Any) -> None: ...


class BackgroundMirror:
    """Copies the newest checkpoint it was told of; one that is superseded before its turn is left out.

    Whatever goes wrong there is a warning and an entry of the ledger, never an error of training.

    Args:
        mirror: where to.
        retain: called with the step after each copy, to delete what the mirror no longer needs.
        report: the ledger.
    """

    def __init__(self, mirror: Mirror, retain: Callable[[int], None], report: Report) -> None:
        self._mirror, self._retain, self._report = mirror, retain, report
        self._lock = threading.Lock()
        self._wanted: Path | None = None
        self._thread: threading.Thread | None = None

    def submit(self, folder: Path) -> None:
        """Have ``folder`` copied as soon as the copy in flight, if there is one, is done; returns at once."""
        with self._lock:
            self._wanted = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for the copies; whether all are done. One that is not is said to be missing."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(seconds)
            if thread.is_alive():
                log.warning("the mirror %s is behind: the newest checkpoint is not there yet", self._mirror.place.name)
                self._tell("mirror_behind", waited_seconds=seconds)
                return False
        return True

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a nicety
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while folder := self._next():
            self._copy(folder)

    def _next(self) -> Path | None:
        with self._lock:
            folder, self._wanted = self._wanted, None
            if folder is None:
                self._thread = None
            return folder

    def _copy(self, folder: Path) -> None:
        began = time.perf_counter()
        try:
            copied = self._mirror.copy_in(folder)
            if copied.outcome == "copied":
                self._retain(copied.step)
        except Exception as error:  # a backend of fsspec may raise anything, and training must not end of it
            log.warning("not mirrored: %s", error)
            self._tell("mirror_failed", checkpoint=folder.name, reason=f"{type(error).__name__}: {error}")
            return
        if copied.outcome != "present":
            self._tell_of(copied, time.perf_counter() - began)

    def _tell_of(self, copied: Copied, seconds: float) -> None:
        kind = "mirrored" if copied.outcome == "copied" else "mirror_skipped"
        self._tell(kind, checkpoint=copied.checkpoint_id, bytes=copied.bytes, seconds=seconds)

    def _tell(self, kind: str, **facts: Any) -> None:
        try:
            self._report(kind, mirror=self._mirror.place.name, **facts)
        except OSError as error:  # a full disk; the log may have room
            log.warning("the ledger took no entry %s of the mirror: %s", kind, error)
