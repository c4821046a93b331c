"""Which Slurm jobs are a run's: the one that runs it, the successor that waits, the one submitted last."""

from __future__ import annotations

import time

from encdec.files import RunPaths
from encdec.records import ContinuationRecord, JobRecord, read_record
from launchers import slurm

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
