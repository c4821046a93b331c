"""One node's part of an attempt: claim or join it, run the agent, judge, write the outcome, see to what follows."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import encdec
from encdec.errors import ExitCode, RunDirectoryError
from encdec.files import RunPaths, atomic_write_json
from encdec.records import JsonLinesWriter, event
from encdec.training.run_config import RunConfig, read_run_config
from launchers import env_secrets
from launchers.launch_options import newest_stop_seconds, read_launch_options
from launchers.nodes import telling
from launchers.nodes.agent import NodeAgent
from launchers.nodes.allocation import (
    Allocation,
    Seat,
    decline,
    head_exit_code,
    identify_process,
    join,
    lead,
    read_allocation,
    wait_for_others,
)
from launchers.nodes.continuation import Continuation, Deadline
from launchers.nodes.forkserver import LOADED
from launchers.nodes.outcomes import judge
from launchers.nodes.parts import NodeJob

MAX_FRUITLESS_RESTARTS = 3
"""Restarts in place without a new step before the attempt is given up."""


def run_attempt(paths: RunPaths) -> int:
    """This node's part of an attempt, from the claim of its number to its outcome; returns the exit code."""
    require_own_code(paths)
    run = read_run_config(paths)
    env_secrets.take_over(paths, os.environ, notify_env=run.config.infra.notify_env)
    allocation = read_allocation(os.environ)
    if allocation is None:
        job = local_job(run, paths)
        with JsonLinesWriter(paths.attempt(job.attempt).events("node-0")) as ledger:
            ledger.write(event("claimed", attempt=job.attempt, began=LOADED))
        return lead_attempt(paths, run, job, NodeAgent(job, paths.attempt(job.attempt)), None)
    if allocation.node_rank > 0:
        return follow_attempt(paths, run, allocation)
    continuation = Continuation(paths, allocation)
    declined = continuation.decline()
    if declined:
        continuation.leave()
        decline(allocation, paths, declined)
        if declined.exit_code != ExitCode.COMPLETE:
            telling.tell_declined(run, declined.reason)
        return declined.exit_code
    job = slurm_job(run, paths, lead(allocation, paths), allocation)
    attempt = paths.attempt(job.attempt)
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        ledger.write(event("claimed", attempt=job.attempt, began=LOADED))
        continuation.begin(ledger)
    deadline = Deadline(allocation.job, continuation.options.lead_seconds, lambda: newest_stop_seconds(attempt))
    agent = NodeAgent(job, attempt, deadline=deadline.passed, warned=continuation.warned)
    return lead_attempt(paths, run, job, agent, continuation)


def lead_attempt(
    paths: RunPaths, run: RunConfig, job: NodeJob, agent: NodeAgent, continuation: Continuation | None
) -> int:
    """The head node's part: run, write the outcome, see to what follows, and write the ledger's last line, for which
    the other nodes wait.
    """
    attempt = paths.attempt(job.attempt)
    facts = agent.run()
    if continuation and facts.result is None and facts.refusal is None:
        facts = replace(facts, bad_node=continuation.bad_node(attempt))
    outcome = judge(facts)
    atomic_write_json(attempt.outcome, outcome.to_json())
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        if continuation:
            continuation.end(outcome, agent.stop_signal, ledger)
        ledger.write(
            event("ended", attempt=job.attempt, cause=outcome.cause, exit_code=outcome.exit_code, step=outcome.step)
        )
    telling.tell_end(paths, run, job.attempt, outcome, hurried=agent.stop_signal is not None)
    wait_for_others(attempt, job.nodes)
    return outcome.exit_code


def follow_attempt(paths: RunPaths, run: RunConfig, allocation: Allocation) -> int:
    """Another node's part: join what the head node has announced, run, and end as it ends."""
    seat = join(allocation, paths)
    if isinstance(seat, int):
        return seat
    job = slurm_job(run, paths, seat, allocation)
    attempt = paths.attempt(job.attempt)
    outcome = judge(NodeAgent(job, attempt).run())
    code = head_exit_code(attempt.events("node-0"))
    if code is None:
        return outcome.exit_code
    with JsonLinesWriter(attempt.events(f"node-{job.node_rank}")) as ledger:
        ledger.write(event("left", node=job.node_rank))
    return ExitCode.COMPLETE  # the head node's code is the job's


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
    launcher = read_launch_options(paths).launcher
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
        launcher=launcher,
        engine=run.config.infra.distributed_type,
    )


def slurm_job(run: RunConfig, paths: RunPaths, seat: Seat, allocation: Allocation) -> NodeJob:
    """This node's part of the attempt of this start of the Slurm job."""
    return NodeJob(
        run_dir=str(paths.root),
        attempt=seat.attempt,
        nodes=allocation.nodes,
        node_rank=allocation.node_rank,
        ranks=run.ranks_per_node,
        endpoint=seat.endpoint,
        rendezvous_id=f"{allocation.start}.{seat.attempt}",
        max_restarts=MAX_FRUITLESS_RESTARTS,
        address=seat.address,
        interface=seat.interface,
        launcher=read_launch_options(paths).launcher,
        engine=run.config.infra.distributed_type,
    )
