"""What submitit carries: the path of a run directory, and nothing else. Everything else is read from there."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from encdec.files import AttemptPaths, RunPaths, atomic_write_json
from encdec.records import JsonLinesWriter, Outcome, event
from encdec.training.run_config import RunConfig, read_run_config
from launchers import slurm
from launchers.agent import NodeAgent
from launchers.allocation import Allocation, head_exit_code, identify_process, read_allocation, take_seat
from launchers.node import NodeJob
from launchers.outcomes import judge, wants_requeue

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
        """Run the attempt to its end; returns its exit code, which under Slurm becomes the task's own."""
        code = run_attempt(RunPaths(Path(self.run_dir)))
        if code and read_allocation(os.environ):
            raise SystemExit(code)  # submitit would end the task with 0, and Slurm would call the job COMPLETED
        return code


def run_attempt(paths: RunPaths) -> int:
    """This node's part of an attempt, from the claim of its number to its outcome; returns the exit code."""
    run = read_run_config(paths)
    allocation = read_allocation(os.environ)
    job = slurm_job(run, paths, allocation) if allocation else local_job(run, paths)
    attempt = paths.attempt(job.attempt)
    agent = NodeAgent(job, attempt)
    outcome = judge(agent.run())
    if job.node_rank > 0:
        code = head_exit_code(attempt.events("node-0"))
        return outcome.exit_code if code is None else code
    atomic_write_json(attempt.outcome, outcome.to_json())
    again = allocation is not None and wants_requeue(outcome, agent.stop_signal)
    close(attempt, job, outcome, requeue=allocation.job if allocation and again else None)
    return outcome.exit_code


def local_job(run: RunConfig, paths: RunPaths) -> NodeJob:
    """Claim the next attempt for this machine alone."""
    number = paths.claim_attempt()
    identify_process(paths.attempt(number).process)
    return NodeJob(
        run_dir=str(paths.root),
        attempt=number,
        nodes=1,
        node_rank=0,
        ranks=run.ranks_per_node,
        endpoint="localhost:0",
        rendezvous_id=f"{run.name}.{number}",
        max_restarts=MAX_FRUITLESS_RESTARTS,
    )


def slurm_job(run: RunConfig, paths: RunPaths, allocation: Allocation) -> NodeJob:
    """Claim or join the attempt of this start of the Slurm job."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # until the agent listens
    seat = take_seat(allocation, paths)
    return NodeJob(
        run_dir=str(paths.root),
        attempt=seat.attempt,
        nodes=allocation.nodes,
        node_rank=allocation.node_rank,
        ranks=run.ranks_per_node,
        endpoint=seat.endpoint,
        rendezvous_id=allocation.start,
        max_restarts=MAX_FRUITLESS_RESTARTS,
        address=seat.address,
        interface=seat.interface,
    )


def close(attempt: AttemptPaths, job: NodeJob, outcome: Outcome, *, requeue: str | None) -> None:
    """Requeue the Slurm job if it is to go on, then write the ledger's last line, for which the other nodes wait."""
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        if requeue:
            problem = slurm.requeue(requeue)
            ledger.write(event("requeue_refused" if problem else "requeued", job=requeue, detail=problem))
        ledger.write(
            event("ended", attempt=job.attempt, cause=outcome.cause, exit_code=outcome.exit_code, step=outcome.step)
        )


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
