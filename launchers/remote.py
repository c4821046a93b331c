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
from collections.abc import Iterator, Mapping
from dataclasses import replace

import submitit
from submitit.core.utils import FailedJobError, JobPaths

from encdec.errors import ConfigError, EncdecError
from encdec.files import RunPaths, atomic_write_json, atomic_write_text
from encdec.records import JobRecord, read_record
from encdec.training.run_config import RunConfig
from launchers import slurm
from launchers.interrupts import held_back
from launchers.job import RunPhase
from launchers.launch_options import LaunchOptions
from launchers.run_directory import code_environment, note, require_snapshot

DEAF = """sh -c 'trap "" USR2; exec "$@"' sh"""
"""Starts Python deaf to a warning that comes before it can have a handler; the job's end time is looked at later."""
PICKLE = re.compile(r"[0-9a-f]{32}\.pkl")
SCRIPT = re.compile(r"\.submission_file_[0-9a-f]{32}\.sh")
"""What submitit writes before sbatch, and moves once it has answered."""


def start(paths: RunPaths, run: RunConfig, flags: Mapping[str, str], options: LaunchOptions) -> str:
    """Submit ``RunPhase(run_dir)``; returns the job id. What sbatch got is kept as ``submit.sbatch``.

    Args:
        flags: sbatch flags that the user gave, by long name.
        options: how the job is to be continued.

    Raises:
        ConfigError: sbatch refused; nothing is queued.
        RunDirectoryError: the snapshot of the code is gone.
    """
    require_snapshot(paths)
    paths.stop_request.unlink(missing_ok=True)  # a request of last time must not stop this attempt
    paths.continuation.unlink(missing_ok=True)  # its jobs have ended
    options.write(paths)
    record = JobRecord(submission=secrets.token_hex(4), job=None, submitted=time.time())
    atomic_write_json(paths.job, record.to_json())
    comment = comment_of(run, record)
    executor = submitit.SlurmExecutor(folder=paths.submitit, python=f"{DEAF} {shlex.quote(sys.executable)}")
    executor.update_parameters(**sbatch_parameters(paths, run, flags, options, comment))
    before = set(paths.submitit.iterdir())
    try:
        # submitit prints what it also raises; a Ctrl-C that killed sbatch might leave a job that nobody knows
        with clean_environment(), contextlib.redirect_stderr(io.StringIO()), held_back():
            job = executor.submit(RunPhase(str(paths.root))).job_id
    except FailedJobError as error:
        queued = slurm.find_job(run.name, comment)  # the answer may have been lost, not the job
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


def comment_of(run: RunConfig, record: JobRecord) -> str:
    """What the job says about itself in Slurm: by it a job is found again whose id was lost."""
    return f"encdec {run.identity[:16]} {record.submission}"


def reconcile(paths: RunPaths, run: RunConfig) -> None:
    """Find the job of a submission whose launcher died before it could write down the id."""
    if not paths.job.is_file():
        return
    record = read_record(paths.job, JobRecord)
    if record.job is not None:
        return
    queued = slurm.find_job(run.name, comment_of(run, record))
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
    """A run directory that was made for a refused submission goes again."""
    try:
        yield
    except EncdecError:
        if fresh:
            shutil.rmtree(paths.root)
        raise


def sbatch_parameters(
    paths: RunPaths, run: RunConfig, flags: Mapping[str, str], options: LaunchOptions, comment: str
) -> dict[str, object]:
    """submitit's parameters for one task per node; pure but for PYTHONPATH. submitit itself adds --open-mode=append."""
    cpus = flags.get("cpus-per-task") or run.ranks_per_node * (1 + run.config.data.dataloader_num_workers)
    return {
        "job_name": run.name,
        "comment": comment,
        "nodes": run.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": int(cpus),
        "gpus_per_node": run.ranks_per_node if run.config.infra.device == "cuda" else None,
        "time": None,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": [f"export {name}={shlex.quote(value)}" for name, value in code_environment(paths).items()],
        "srun_args": ["--kill-on-bad-exit=1", "--wait=60", f"--cpus-per-task={cpus}"],
        "additional_parameters": {
            "requeue": True,
            "signal": f"USR2@{options.lead_seconds}",
            **{flag: value for flag, value in flags.items() if flag != "cpus-per-task"},
        },
    }


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
