"""The process that ranks are forked from. It imports torch and transformers once, while the agent gets ready."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import signal


def block_warnings() -> None:
    """A cluster's warning signal may reach all processes of a job, and would kill those without a handler. So it is
    blocked from here on: the helpers stay so, the agent unblocks it when it listens, ranks when they ignore it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})


def start_forkserver() -> None:
    """Start it, and multiprocessing's resource tracker with it."""
    multiprocessing.set_forkserver_preload(["launchers.preload"])
    multiprocessing.forkserver.ensure_running()
