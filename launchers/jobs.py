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
    submitted = submission(paths)
    jobs = [*continuing_jobs(paths), submitted.job if submitted else None]
    return list(dict.fromkeys(job for job in jobs if job is not None))


def newest_jobs(paths: RunPaths) -> list[str]:
    """As ``jobs_of``, without the submitted job where others have gone on from it."""
    return continuing_jobs(paths) or jobs_of(paths)


def continuing_jobs(paths: RunPaths) -> list[str]:
    """The job that runs or ran the run since its newest submission, and the one that waits for its end."""
    if not paths.continuation.is_file():
        return []
    record = read_record(paths.continuation, ContinuationRecord)
    return [record.job, record.successor] if record.successor else [record.job]


def submission(paths: RunPaths) -> JobRecord | None:
    """The newest submission to Slurm; its job is None while sbatch has not answered."""
    return read_record(paths.job, JobRecord) if paths.job.is_file() else None


def began_since_submission(began: float | None, submitted: JobRecord | None) -> bool:
    """Whether an attempt that began then, seconds since the epoch, is later than the newest submission."""
    return began is not None and (submitted is None or began > submitted.submitted)


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
