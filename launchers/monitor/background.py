"""Work that may take long, beside the screen: storage that hangs, a Slurm that does not answer, a save."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from textual.app import App

Value = TypeVar("Value")


def in_background(
    app: App[None], work: Callable[[], Value], then: Callable[[Value], None], *, must_end: bool = False
) -> None:
    """Run ``work`` in a thread, and ``then`` with what it returned on the screen's own, if that is still there.

    Args:
        must_end: whether the program waits for it at its end.
    """

    def run() -> None:
        value = work()
        with contextlib.suppress(RuntimeError):  # the screen has been closed meanwhile
            app.call_from_thread(then, value)

    threading.Thread(target=run, daemon=not must_end).start()
