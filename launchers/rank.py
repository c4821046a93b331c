"""What the agent starts as a rank. Light to import: the forkserver has loaded the heavy modules before."""

from __future__ import annotations

import ctypes
import signal
from typing import Any

PR_SET_PDEATHSIG = 1
"""prctl(2): signal to receive when the parent dies. The parent is the forkserver, which ends with its agent."""


def run_rank(run_dir: str, attempt: int) -> dict[str, Any]:
    """Train as the rank that the environment names; dies with its agent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    from encdec.train import run_rank_of_attempt

    return run_rank_of_attempt(run_dir, attempt)
