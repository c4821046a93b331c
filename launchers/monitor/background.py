"""Work that may take long, beside the screen: storage that hangs, a Slurm that does not answer, a save."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import TypeVar

from textual.app import App

Value = TypeVar("Value")


def in_background(
    app: App[None], work: Callable[[], Value], then: Callable[[Value], None], *, must_end: bool = False
) -> None:
    """Run ``work`` in a thread, and ``then`` with what it returned on the screen's own, if that is still there.

    An error of either ends the application with its traceback: a view that stood still would be taken for the truth.

    Args:
        must_end: whether the program waits for it at its end.
    """

    def run() -> None:
        try:
            finish = functools.partial(then, work())
        except Exception as error:
            finish = functools.partial(throw, error)
        with contextlib.suppress(RuntimeError):  # the screen has been closed meanwhile
            app.call_later(finish)  # textual takes messages from any thread

    threading.Thread(target=run, daemon=not must_end).start()


def throw(error: Exception) -> None:
    raise error
