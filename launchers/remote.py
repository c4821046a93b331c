"""Hands an attempt to Slurm through submitit, and follows it through its files."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping

import submitit
from submitit.core.utils import FailedJobError

from encdec.command_line import INTERRUPTED
from encdec.errors import ConfigError, EncdecError, ExitCode
from encdec.files import RunPaths, atomic_write_json, atomic_write_text
from encdec.records import JobRecord, Outcome, ProcessRecord, read_record
from encdec.training.run_config import RunConfig
from launchers import show, slurm
from launchers.interrupts import held_back
from launchers.job import RunPhase
from launchers.progress import Progress, make_console
from launchers.run_directory import code_environment, note, require_snapshot

SIGNAL_LEAD_SECONDS = 120
"""Warning before the time limit: one step, the last checkpoint and its verification."""
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_SQUEUES = 10.0
LOOKS_TO_BELIEVE_AN_END = 2
"""A job that Slurm is about to requeue after a lost node passes through an end state."""
KEPT = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")
"""Which cluster, and as whom: not facts of the job that this shell may be part of."""


def live_job(paths: RunPaths) -> str | None:
    """Job id of the run's newest submission if that job waits or runs, or nobody can say that it does not.

    Slurm is asked only if the run was ever submitted to it.
    """
    if not paths.job.is_file():
        return None
    job = read_record(paths.job, JobRecord).job
    return None if slurm.job_state(job) in slurm.END_STATES else job


def start(paths: RunPaths, run: RunConfig, flags: Mapping[str, str]) -> str:
    """Submit ``RunPhase(run_dir)``; returns the job id. What sbatch got is kept as ``submit.sbatch``.

    Args:
        flags: sbatch flags that the user gave, by long name.

    Raises:
        ConfigError: sbatch refused; nothing is queued.
        RunDirectoryError: the snapshot of the code is gone.
    """
    require_snapshot(paths)
    paths.make()
    paths.stop_request.unlink(missing_ok=True)  # a request of last time must not stop this attempt
    executor = submitit.SlurmExecutor(folder=paths.submitit)
    executor.update_parameters(**sbatch_parameters(paths, run, flags))
    before = set(paths.submitit.iterdir())
    try:
        # submitit prints what it also raises; a Ctrl-C that killed sbatch might leave a job that nobody knows
        with outside_any_job(), contextlib.redirect_stderr(io.StringIO()), held_back():
            job = executor.submit(RunPhase(str(paths.root)))
    except FailedJobError as error:
        for leftover in set(paths.submitit.iterdir()) - before:
            leftover.unlink()
        raise ConfigError(
            "Slurm must accept the job",
            found=slurm.refusal(str(error)),
            remedy="Nothing is queued; correct the flag it names (sinfo shows partitions, limits, nodes and GPUs), and "
            "give the command again",
        ) from None
    atomic_write_json(paths.job, JobRecord(job=job.job_id, submitted=time.time()).to_json())
    atomic_write_text(paths.root / "submit.sbatch", job.paths.submission_file.read_text(encoding="utf-8"))
    note(paths, "submitted", cluster="slurm", job=job.job_id)
    return job.job_id


@contextlib.contextmanager
def removed_if_refused(paths: RunPaths, *, fresh: bool) -> Iterator[None]:
    """A run directory that was made for a refused submission goes again."""
    try:
        yield
    except EncdecError:
        if fresh:
            shutil.rmtree(paths.root)
        raise


def sbatch_parameters(paths: RunPaths, run: RunConfig, flags: Mapping[str, str]) -> dict[str, object]:
    """submitit's parameters for one task per node; pure but for PYTHONPATH. submitit itself adds --open-mode=append."""
    cpus = flags.get("cpus-per-task") or run.ranks_per_node * (1 + run.config.data.dataloader_num_workers)
    return {
        "job_name": run.name,
        "comment": f"encdec {run.identity}",
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
            "signal": f"USR2@{SIGNAL_LEAD_SECONDS}",
            **{flag: value for flag, value in flags.items() if flag != "cpus-per-task"},
        },
    }


@contextlib.contextmanager
def outside_any_job() -> Iterator[None]:
    """The environment without what a surrounding job or the user's defaults would lay over the script."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name not in KEPT:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def follow(paths: RunPaths, job: str, *, total_steps: int) -> int:
    """Show progress until the job's work is over, through all its requeues; returns the last attempt's exit code.

    Asks squeue at most once in SECONDS_BETWEEN_SQUEUES, for jobs that die without a word. Ctrl-C stops watching only.

    Raises:
        EncdecError: the job ended before it could claim an attempt.
    """
    watch = Watch(paths, job, total_steps)
    try:
        while not watch.over():
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        watch.close()
        show.queued(job, paths)
        return INTERRUPTED
    watch.close()
    if watch.number is None:
        raise EncdecError(
            "A job must live until its attempt begins",
            found=f"job {job}, which ended {watch.state}",
            remedy=f"See its output in {paths.submitit}, then give the same command again",
        )
    return show.summary(paths)


class Watch:
    """What the run directory and, now and then, Slurm say about one job.

    Args:
        paths: the run directory.
        job: its id.
        total_steps: steps at which the run is complete.
    """

    def __init__(self, paths: RunPaths, job: str, total_steps: int) -> None:
        self.number: int | None = None
        """Newest attempt that the job has claimed."""
        self.state = slurm.UNKNOWN
        self._paths, self._job, self._total = paths, job, total_steps
        self._view: Progress | None = None
        self._ends_seen = 0
        self._next_squeue = 0.0

    def over(self) -> bool:
        """Look once: whether an attempt ended for good, or Slurm says that none will follow."""
        self._look_at_files()
        outcome = self._outcome()
        if outcome is not None and outcome != ExitCode.CONTINUE_ME:
            return True
        if time.monotonic() >= self._next_squeue:
            self._look_at_slurm()
        return self._ends_seen >= LOOKS_TO_BELIEVE_AN_END

    def close(self) -> None:
        if self._view:
            self._view.close()

    def _look_at_files(self) -> None:
        newest = self._paths.newest_attempt()
        if newest != self.number and newest is not None and self._is_of_job(newest):
            self.close()
            self.number = newest
            self._view = Progress(self._paths.attempt(newest), self._total)
            self._view.say(f"job {self._job} runs attempt {newest}")
        if self._view:
            self._view.refresh()

    def _is_of_job(self, number: int) -> bool:
        process = self._paths.attempt(number).process
        return process.is_file() and read_record(process, ProcessRecord).job == self._job

    def _outcome(self) -> int | None:
        if self.number is None or not self._paths.attempt(self.number).outcome.is_file():
            return None
        return read_record(self._paths.attempt(self.number).outcome, Outcome).exit_code

    def _look_at_slurm(self) -> None:
        self._next_squeue = time.monotonic() + SECONDS_BETWEEN_SQUEUES
        state = slurm.job_state(self._job)
        self._ends_seen = self._ends_seen + 1 if state in slurm.END_STATES else 0
        if state != self.state and (self._view is None or state != "RUNNING"):
            make_console().print(f"job {self._job} is {state}")
        self.state = state
