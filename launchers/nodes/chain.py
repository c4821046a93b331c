"""What a phase's job does for the phases after it, and asks of the one before. Slurm's dependencies prove nothing: a
job that waited for another one's end looks for the gate itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from encdec.errors import GateNotPassed
from encdec.files import RunPaths, atomic_write_json
from encdec.records import JobRecord, read_record
from encdec.training.promotion import phase_before, read_gate, read_origin, require_passed
from encdec.training.run_config import read_run_config
from launchers import slurm
from launchers.chain_file import chain_of, later_phases, read_chain
from launchers.jobs import jobs_of, newest_jobs, submission
from launchers.nodes.allocation import Announcement, announcement, read_allocation
from launchers.nodes.forkserver import leave_pending
from launchers.run_directory import code_environment, note
from launchers.run_status import read_status


def why_not_yet(paths: RunPaths) -> str | None:
    """Why the phase may not begin: the one before has not passed its gate; None where it may, or has begun."""
    if chain_of(paths) is None:
        return None
    run = read_run_config(paths)
    if run.starts_from is None or run.starts_from.kind != "gate" or run.phase is None or read_origin(paths):
        return None
    try:
        require_passed(run.starts_from, run.phase.phase)
        return None
    except GateNotPassed as closed:
        return f"the gate of {phase_before(run.phase.phase)}: {closed.found}"


def jobs_before(paths: RunPaths, *, but: str) -> list[str]:
    """The live jobs of the phase before: it may still pass its gate.

    Args:
        but: the job that asks.
    """
    start = read_run_config(paths).starts_from
    assert start is not None
    jobs = [job for job in newest_jobs(RunPaths(Path(start.source))) if job != but]
    states = slurm.job_states(jobs)
    return [job for job in jobs if not states[job].ended]


def adopt(paths: RunPaths, job: str) -> None:
    """``job`` is the run's from now on, in place of the one that was submitted."""
    record = read_record(paths.job, JobRecord)
    atomic_write_json(paths.job, replace(record, job=job, submitted=time.time()).to_json())


def take_along(paths: RunPaths, job: str) -> None:
    """In a chain that is one job, the one that runs a phase now is that of the phases after it."""
    root = chain_of(paths)
    record = read_chain(root) if root else None
    for later in later_phases(paths).values() if record and record.in_one_allocation else ():
        known = submission(later)
        if known and known.job != job:
            adopt(later, job)


def wait_for(paths: RunPaths, jobs: Sequence[str]) -> None:
    """The job of the next phase waits for the end of all of these instead. If Slurm does not take that, it will see for
    itself that it has begun too early.
    """
    for later in list(later_phases(paths).values())[:1]:
        record = submission(later)
        if record and record.job and record.job not in jobs:
            slurm.depend(record.job, jobs)


def end(paths: RunPaths, own_job: str, why: str) -> None:
    """Take the later phases out of the queue, the last one first, and leave word why."""
    for later in reversed(later_phases(paths).values()):
        if read_status(later).attempts:
            continue  # it has been begun from an earlier proof, and is none of this chain's future
        jobs = [job for job in jobs_of(later) if job != own_job]
        states = slurm.job_states(jobs)
        live = [job for job in jobs if not states[job].ended]
        for job in live:
            slurm.cancel(job)
        if live or own_job in jobs_of(later):
            tell(later, f"{paths.root.name} ended before it: {why}")


def tell(paths: RunPaths, why: str) -> None:
    """Leave word in the run's ledger that it has not been started."""
    note(paths, "not_started", why=why)


def next_phase_here(paths: RunPaths) -> RunPaths | None:
    """The phase with which this job goes on itself, now that its own is over; None where it ends.

    Every node decides by the same files: the chain's, and the gate that the head node has written. Whether the next
    phase is put off, its own announcement says.
    """
    root = chain_of(paths)
    record = read_chain(root) if root else None
    later = next(iter(later_phases(paths).values()), None)
    if record is None or not record.in_one_allocation or later is None or not read_status(paths).complete:
        return None
    run = read_run_config(paths)
    gate = read_gate(paths, run.phase.phase) if run.phase else None
    proved = gate is not None and gate.passed and gate.identity == run.identity
    return later if proved and not is_declined(later) else None


def is_declined(paths: RunPaths) -> bool:
    """Whether the head node has said that this start of the job does not run the phase."""
    allocation = read_allocation(os.environ)
    told = announcement(allocation, paths) if allocation else None
    return told is not None and told.is_file() and read_record(told, Announcement).attempt is None


def go_on(paths: RunPaths) -> NoReturn:
    """Become the job of the next phase, with its own snapshot of the code. The signals that have come since the agent
    has ended, and which would kill a starting Python, stay with the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, **code_environment(paths)}
    leave_pending()
    os.execve(sys.executable, [sys.executable, "-u", "-m", "launchers.job", str(paths.root)], environment)
