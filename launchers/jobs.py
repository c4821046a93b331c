"""Which Slurm jobs are a run's: the one that runs it, the successor that waits, the one submitted last."""

from __future__ import annotations

from encdec.files import RunPaths
from encdec.records import ContinuationRecord, JobRecord, read_record
from launchers import slurm


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
    return next((job for job in jobs_of(paths) if slurm.job_state(job) not in slurm.END_STATES), None)
