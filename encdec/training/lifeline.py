"""What ties a rank to the agent that started it: the agent's death, and its word that another rank has died.

Light to import: a forked rank does it before anything else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent dies."""


def die_with_parent(parent: int) -> None:
    """A killed agent leaves no rank behind. For a rank that is the agent's own child; it is told the agent's pid, for
    the agent may have died before this call.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def listen_to_agent(agent: int | None) -> None:
    """From now on SIGTERM is told apart by its sender, and a warning does not kill a rank that has nothing to save yet
    (the agent sends it again). To be called before any other thread starts: all inherit the mask.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_termination, args=(agent,), daemon=True).start()


def _obey_termination(agent: int | None) -> None:
    """SIGTERM from the agent means that another rank has died: nothing is left to save, and torch elastic would wait
    30 s for a rank that takes it as a request to save. From anybody else (a cluster that preempts) it is that request.
    """
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        os.kill(os.getpid(), signal.SIGKILL if sender == agent else signal.SIGUSR2)
