"""What the agent starts as a rank. Light to import: the forkserver has loaded the heavy modules before."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

from encdec.training import lifeline
from launchers.nodes.parts import network_variables


def run_rank(run_dir: str, attempt: int, interface: str) -> None:
    """Train as the rank that the environment names, meeting the others over ``interface``; dies with its agent, and at
    once when its agent says so.
    """
    for name, value in network_variables(interface).items():
        os.environ.setdefault(name, value)
    agent = multiprocessing.parent_process()
    lifeline.listen_to_agent(agent.pid if agent else None)
    threading.Thread(target=_die_with_agent, daemon=True).start()
    from encdec.train import run_rank_of_attempt

    run_rank_of_attempt(run_dir, attempt)


def _die_with_agent() -> None:
    """A killed agent leaves no rank behind. prctl's death signal is no help: a rank's parent is the forkserver, which
    lives on as long as any rank does.
    """
    agent = multiprocessing.parent_process()
    if agent is not None:
        multiprocessing.connection.wait([agent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)
