"""The process that ranks are forked from. It imports torch and transformers once, while the agent gets ready."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import signal
import threading
import time

EARLY = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""Signals that ask to save."""
LOADED = time.time()
"""When this process began to load the launcher, seconds since the epoch. Its creation time is no such moment: it is
counted from the boot, and a job of several phases is one process.
"""
early_signals: list[str] = []
"""Names of the signals that came before the agent could listen."""


def listen_early(*, for_exec: bool = False) -> None:
    """Note the signals that ask to save until the agent listens; nothing else has come into being that could save.

    A cluster's warning may also reach all processes of a job, and would kill those without a handler. So it is blocked
    from here on: the helpers stay so, the agent unblocks it when it listens, ranks when they ignore it.

    Args:
        for_exec: this process may become another program, in which handlers are gone and masks stay: block all of
            them. Otherwise only SIGUSR2, and SIGTERM again not: no helper may be deaf to it.
    """
    for number in EARLY:
        signal.signal(number, lambda number, frame: early_signals.append(signal.Signals(number).name))
    signal.pthread_sigmask(signal.SIG_BLOCK, EARLY if for_exec else {signal.SIGUSR2})
    if not for_exec:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def leave_pending() -> None:
    """Send the signals noted early once more, to this thread, which has them blocked: they outlive its exec. One that
    another thread has taken would be gone with it.
    """
    for name in early_signals:
        signal.pthread_kill(threading.get_ident(), signal.Signals[name])


def start_forkserver() -> None:
    """Start it, and multiprocessing's resource tracker with it."""
    multiprocessing.set_forkserver_preload(["launchers.nodes.preload"])
    multiprocessing.forkserver.ensure_running()
