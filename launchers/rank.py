"""What the agent starts as a rank. Light to import: the forkserver has loaded the heavy modules before."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from typing import Any


def run_rank(run_dir: str, attempt: int, interface: str) -> dict[str, Any]:
    """Train as the rank that the environment names, meeting the others over ``interface``; dies with its agent, and at
    once when its agent says so.
    """
    for library in ("GLOO", "NCCL"):
        if library == "GLOO" or interface != "lo":  # on one node NCCL needs no network
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before any other thread: all inherit it
    for watch in (_die_with_agent, _obey_termination):
        threading.Thread(target=watch, daemon=True).start()
    from encdec.training.rank import run_rank_of_attempt

    return run_rank_of_attempt(run_dir, attempt)


def _die_with_agent() -> None:
    """A killed agent leaves no rank behind. prctl's death signal is no help: a rank's parent is the forkserver, which
    lives on as long as any rank does.
    """
    agent = multiprocessing.parent_process()
    if agent is not None:
        multiprocessing.connection.wait([agent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def _obey_termination() -> None:
    """SIGTERM from the agent means that another rank has died: nothing is left to save, and torch elastic would wait
    30 s for a rank that takes it as a request to save. From anybody else (a cluster that preempts) it is that request.
    """
    agent = multiprocessing.parent_process()
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        os.kill(os.getpid(), signal.SIGKILL if agent and sender == agent.pid else signal.SIGUSR2)
