"""What submitit carries: the path of a run directory, and nothing else. Everything else is read from there."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

import psutil

from encdec.files import RunPaths, atomic_write_json
from encdec.records import JsonLinesWriter, event
from encdec.training.run_config import read_run_config
from launchers.agent import NodeAgent, NodeJob
from launchers.outcomes import judge

MAX_FRUITLESS_RESTARTS = 3
"""Restarts in place without a new step before the attempt is given up."""


class RunPhase:
    """One attempt of the run in ``run_dir``. Tiny and stable, so that a pickled one outlives changes of the code.

    Args:
        run_dir: the run directory, absolute.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def __call__(self) -> int:
        """Run the attempt to its end; returns its exit code."""
        return run_attempt(RunPaths(Path(self.run_dir)))


def run_attempt(paths: RunPaths) -> int:
    """Claim the next attempt number, run it, write its outcome; returns the exit code."""
    run = read_run_config(paths)
    number = paths.claim_attempt()
    attempt = paths.attempt(number)
    identify_process(attempt.process)
    job = NodeJob(
        run_dir=str(paths.root),
        attempt=number,
        nodes=1,
        node_rank=0,
        ranks=run.ranks_per_node,
        endpoint="localhost:0",
        rendezvous_id=f"{run.name}.{number}",
        max_restarts=MAX_FRUITLESS_RESTARTS,
    )
    outcome = judge(NodeAgent(job, attempt).run())
    atomic_write_json(attempt.outcome, outcome.to_json())
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        ledger.write(
            event("ended", attempt=number, cause=outcome.cause, exit_code=outcome.exit_code, step=outcome.step)
        )
    return outcome.exit_code


def identify_process(path: Path) -> None:
    """Write which process runs the attempt; a pid alone can be used again, so its creation time goes along."""
    process = psutil.Process()
    atomic_write_json(path, {"host": socket.gethostname(), "pid": process.pid, "created": process.create_time()})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launchers.job", description="Run one attempt of a run directory here."
    )
    parser.add_argument("run_dir", type=Path, help="a run directory made by launchers.submit")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    return run_attempt(RunPaths(arguments.run_dir.absolute()))


if __name__ == "__main__":
    sys.exit(main())
