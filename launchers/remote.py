"""Hands a run to Slurm through submitit."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

import submitit
from submitit.core.utils import FailedJobError, JobPaths

from encdec.errors import ConfigError, EncdecError
from encdec.files import RunPaths, atomic_write_json, atomic_write_text
from encdec.records import JobRecord, read_record
from encdec.training.run_config import RunConfig
from launchers import slurm
from launchers.cluster_file import ClusterFile
from launchers.interrupts import held_back
from launchers.job import RunPhase
from launchers.launch_options import LaunchOptions, launch_options
from launchers.run_directory import note, require_snapshot
from launchers.script import UNKNOWN_SUBMISSION, JobRequest, comment_of, job_text, submitit_parameters

PICKLE = re.compile(r"[0-9a-f]{32}\.pkl")
SCRIPT = re.compile(r"\.submission_file_[0-9a-f]{32}\.sh")
"""What submitit writes before sbatch, and moves once it has answered."""


def start(paths: RunPaths, run: RunConfig, arguments: Namespace, *, after: Sequence[str] = ()) -> str:
    """Submit ``RunPhase(run_dir)``; returns the job id. What sbatch got is kept as ``submit.sbatch``.

    Args:
        after: jobs whose end it waits for, however they end: that proves nothing, and the job looks for itself whether
            the phase before has passed its gate.

    Raises:
        ConfigError: sbatch refused; nothing is queued.
        Unanswered: nobody knows whether anything is.
        RunDirectoryError: the snapshot of the code is gone.
    """
    options = make_ready(paths, arguments)
    record = new_record(paths, job=None)
    atomic_write_json(paths.job, record.to_json())
    request = job_request(paths, run, arguments, options, submission=record.submission, after=after)
    executor = submitit.SlurmExecutor(folder=paths.submitit, python=request.starter)
    executor.update_parameters(**submitit_parameters(request))
    before = set(paths.submitit.iterdir())
    try:
        # submitit prints what it also raises; a Ctrl-C that killed sbatch might leave a job that nobody knows
        with clean_environment(), contextlib.redirect_stderr(io.StringIO()), held_back():
            job = executor.submit(RunPhase(str(paths.root))).job_id
    except FailedJobError as error:
        queued = slurm.find_job(run.name, request.comment)  # the answer may have been lost, not the job
        if queued is None:
            for leftover in set(paths.submitit.iterdir()) - before:
                leftover.unlink()
            paths.job.unlink()
            raise ConfigError(
                "Slurm must accept the job",
                found=slurm.refusal(str(error)),
                remedy="Nothing is queued; correct the flag it names (sinfo shows partitions, limits, nodes and GPUs), "
                "and give the command again",
            ) from None
        job = queued
    adopt(paths, replace(record, job=job))
    return job


def share(paths: RunPaths, run: RunConfig, arguments: Namespace, job: str, *, mark: str = "") -> None:
    """``job``, which this command has queued for an earlier phase or runs in, goes on with this run.

    Args:
        mark: a line of the script that successors get.

    Raises:
        RunDirectoryError: the snapshot of the code is gone.
    """
    options = make_ready(paths, arguments)
    record = new_record(paths, job=job)
    request = job_request(paths, run, arguments, options, submission=record.submission)
    atomic_write_text(paths.sbatch, job_text(request, mark))
    atomic_write_json(paths.job, record.to_json())
    note(paths, "submitted", cluster="slurm", job=job)


def new_record(paths: RunPaths, *, job: str | None) -> JobRecord:
    """That of a submission that is made now."""
    before = len(paths.attempt_numbers())
    return JobRecord(submission=secrets.token_hex(4), job=job, submitted=time.time(), attempts_before=before)


def make_ready(paths: RunPaths, arguments: Namespace) -> LaunchOptions:
    """What was asked of the jobs of last time is over; what is asked of the next ones is written down."""
    require_snapshot(paths)
    paths.make()
    paths.stop_request.unlink(missing_ok=True)  # must not stop the next attempt
    paths.continuation.unlink(missing_ok=True)  # its jobs have ended
    for announcement in paths.announcements():  # a cluster that begins anew counts its jobs from 1 again
        announcement.unlink()
    options = launch_options(paths, arguments)
    options.write(paths)
    return options


def job_request(
    paths: RunPaths,
    run: RunConfig,
    arguments: Namespace,
    options: LaunchOptions,
    *,
    submission: str = UNKNOWN_SUBMISSION,
    after: Sequence[str] = (),
) -> JobRequest:
    """What the user asks Slurm for, from here and now."""
    cluster: ClusterFile = arguments.cluster_file
    return JobRequest(
        paths=paths,
        run=run,
        cluster=cluster,
        flags={**arguments.sbatch, **({"dependency": f"afterany:{':'.join(after)}"} if after else {})},
        lead_seconds=options.lead_seconds,
        submission=submission,
        python=cluster.python or shlex.quote(sys.executable),
        pythonpath=os.environ.get("PYTHONPATH", ""),
    )


def reconcile(paths: RunPaths, run: RunConfig) -> None:
    """Find the job of a submission whose launcher died before it could write down the id.

    Raises:
        Unanswered: Slurm does not say whether there is one.
    """
    if not paths.job.is_file():
        return
    record = read_record(paths.job, JobRecord)
    if record.job is not None:
        return
    queued = slurm.find_job(run.name, comment_of(run, record.submission))
    if queued is not None:
        adopt(paths, replace(record, job=queued))


def adopt(paths: RunPaths, record: JobRecord) -> None:
    """Write down which job it is. If submitit was cut off after sbatch, lay out the files that the job looks for."""
    assert record.job is not None
    place = JobPaths(paths.submitit, record.job)
    for pattern, target in ((PICKLE, place.submitted_pickle), (SCRIPT, place.submission_file)):
        waiting = [path for path in paths.submitit.iterdir() if pattern.fullmatch(path.name) and not path.is_symlink()]
        if waiting and not target.exists():
            max(waiting, key=lambda path: path.stat().st_mtime).rename(target)
    atomic_write_text(paths.sbatch, place.submission_file.read_text(encoding="utf-8"))
    atomic_write_json(paths.job, record.to_json())
    note(paths, "submitted", cluster="slurm", job=record.job)


@contextlib.contextmanager
def removed_if_refused(paths: RunPaths, *, fresh: bool) -> Iterator[None]:
    """A run directory that was made for a refused submission goes again; not where a job may be queued."""
    try:
        yield
    except slurm.Unanswered:
        raise
    except EncdecError:
        if fresh:
            shutil.rmtree(paths.root)
        raise


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """This process's environment as if outside any job: submitit hands it to sbatch."""
    before = dict(os.environ)
    clean = slurm.outside_any_job(before)
    os.environ.clear()
    os.environ.update(clean)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
