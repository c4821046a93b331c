"""Which Slurm jobs are a run's: the one that runs it, the successor that waits, the one submitted last."""

from __future__ import annotations

import time

from encdec.errors import RunDirectoryError
from encdec.files import RunPaths
from encdec.records import ContinuationRecord, JobRecord, read_record
from launchers import slurm
from launchers.run_status import read_status

LOOKS_TO_BELIEVE_AN_END = 2
SECONDS_BETWEEN_LOOKS = 3.0
"""A job that Slurm is about to requeue after a lost node passes through an end state."""


def jobs_of(paths: RunPaths) -> list[str]:
    """Ids of the jobs that may still do something for the run, the one that runs it first.

    Raises:
        RunDirectoryError: a damaged record.
    """
    jobs: list[str | None] = []
    if paths.continuation.is_file():
        record = read_record(paths.continuation, ContinuationRecord)
        jobs += [record.job, record.successor]
    if paths.job.is_file():
        jobs.append(read_record(paths.job, JobRecord).job)
    return list(dict.fromkeys(job for job in jobs if job is not None))


def live_job(paths: RunPaths) -> str | None:
    """The first of the run's jobs that waits or runs, or of which nobody can say that it does not.

    Slurm is asked only if the run was ever submitted to it.
    """
    jobs = jobs_of(paths)
    for look in range(LOOKS_TO_BELIEVE_AN_END if jobs else 0):
        if look:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        for job in jobs:
            if slurm.job_state(job) not in slurm.END_STATES:
                return job
    return None


def require_no_other_job(paths: RunPaths, job: str) -> None:
    """Refuse to let ``job`` run what another job, or a process outside Slurm, runs already.

    Raises:
        RunDirectoryError: naming it.
    """
    other, host = live_job(paths), read_status(paths).host
    if other in (None, job) and host is None:
        return
    raise RunDirectoryError(
        "One job at a time runs a run",
        found=f"{paths.root} in the hands of " + (f"an attempt on {host}" if host else f"job {other}"),
        remedy="Let it go on, or end it first (touch " + str(paths.stop_request) + " saves and stops it)",
    )
