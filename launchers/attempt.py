"""One node's part of an attempt: claim or join it, run the agent, judge, write the outcome, requeue."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import encdec
from encdec.errors import RunDirectoryError
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


def run_attempt(paths: RunPaths) -> int:
    """This node's part of an attempt, from the claim of its number to its outcome; returns the exit code."""
    require_own_code(paths)
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


def require_own_code(paths: RunPaths) -> None:
    """An attempt runs the snapshot in its run directory, however often the checkout has changed since.

    Raises:
        RunDirectoryError: this process has loaded other code.
    """
    loaded = Path(encdec.__path__[0]).resolve()
    if not loaded.is_relative_to(paths.code.resolve()):
        raise RunDirectoryError(
            "An attempt runs the code of its run directory",
            found=f"{loaded}, not {paths.code}",
            remedy="Start it with launchers.submit, or with PYTHONSAFEPATH=1 "
            f"PYTHONPATH={shlex.quote(str(paths.code))}",
        )


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
