"""Runs an attempt on this machine through submitit's local executor, and follows it through its files."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import submitit

from encdec.command_line import INTERRUPTED
from encdec.errors import EncdecError, RunDirectoryError
from encdec.files import RunPaths
from encdec.records import ProcessRecord, read_record
from encdec.training.run_config import RunConfig
from launchers.interrupts import Interrupts, held_back
from launchers.job import RunPhase
from launchers.launch_options import LaunchOptions
from launchers.run_directory import code_environment, note, require_snapshot, why_no_room
from launchers.run_status import read_status
from launchers.views import show
from launchers.views.progress import Progress

MINUTES_PER_YEAR = 365 * 24 * 60
SECONDS_TO_CLAIM = 600.0
"""Python may start slowly from cold shared storage."""
SECONDS_BETWEEN_LOOKS = 0.1


def start(paths: RunPaths, run: RunConfig, options: LaunchOptions) -> None:
    """Hand ``RunPhase(run_dir)`` to submitit's local executor, and wait until its attempt can be seen.

    Raises:
        RunDirectoryError: the snapshot of the code is gone.
        EncdecError: the job died before it could claim an attempt.
    """
    require_snapshot(paths)
    paths.make()
    paths.stop_request.unlink(missing_ok=True)  # a request of last time must not stop this attempt
    options.write(paths)
    before = paths.newest_attempt()
    note(paths, "submitted", cluster="local")
    executor = submitit.LocalExecutor(folder=paths.submitit)
    executor.update_parameters(
        timeout_min=MINUTES_PER_YEAR,
        tasks_per_node=1,
        gpus_per_node=run.ranks_per_node if run.config.infra.device == "cuda" else 0,
        stderr_to_stdout=True,
    )
    with job_environment(paths), output_to(paths.submitit / "controller.log"), held_back():
        job = executor.submit(RunPhase(str(paths.root)))
    deadline = time.monotonic() + SECONDS_TO_CLAIM
    while not identified(paths, before):
        ended = job.done()
        if (ended or time.monotonic() > deadline) and not identified(paths, before):
            raise why_no_attempt(paths, job, ended=ended)
        time.sleep(0.02)


def why_no_attempt(paths: RunPaths, job: submitit.Job[int], *, ended: bool) -> EncdecError:
    """What to tell of a job that claimed no attempt; a refusal if it refused."""
    log = job.paths.stdout
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = text.strip().splitlines() or ["no word in its log"]
    refusals = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    kind = RunDirectoryError if refusals else EncdecError
    no_room = why_no_room(paths)
    return kind(
        "A job must live until its attempt begins",
        found=f"job {job.job_id}, which {'ended' if ended else 'is silent'}: "
        f"{no_room[0] if no_room else (refusals or lines)[-1].rstrip('.')}",
        remedy=f"See {log}, then give the same command again",
    )


def identified(paths: RunPaths, before: int | None) -> bool:
    """Whether an attempt newer than ``before`` has been claimed and says which process runs it."""
    newest = paths.newest_attempt()
    return newest != before and newest is not None and paths.attempt(newest).process.is_file()


@contextlib.contextmanager
def job_environment(paths: RunPaths) -> Iterator[None]:
    """The snapshot of the code goes first."""
    before = dict(os.environ)
    os.environ.update(code_environment(paths))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """What is started meanwhile writes to ``log``: it outlives this command and must not keep a pipe open behind it."""
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        for descriptor in kept:
            os.dup2(target, descriptor)
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(target)


def follow(paths: RunPaths, interrupts: Interrupts, *, total_steps: int) -> int:
    """Show progress until the newest attempt has ended; returns its exit code.

    Ctrl-C asks it to save and stop; another one stops following.
    """
    number = paths.newest_attempt()
    assert number is not None, "only a run with an attempt can be followed"
    view = Progress(paths.attempt(number), total_steps)
    asked = 0
    try:
        while (running := read_status(paths).running) and interrupts.count < 2:
            view.refresh()
            if interrupts.count > asked:
                asked = interrupts.count
                view.say("finishing the step, then saving; Ctrl-C again stops watching and lets the run go on saving")
                ask_to_stop(paths, number, signal.SIGINT)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        view.refresh()
    finally:
        view.close()
    if running:
        show.left_running(paths)
        return INTERRUPTED
    return show.summary(paths)


def ask_to_stop(paths: RunPaths, number: int, why: signal.Signals) -> None:
    """Send the attempt's agent a signal that means: finish the step, save, leave.

    Args:
        why: what the outcome tells: SIGINT for Ctrl-C, SIGTERM for a cancel.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(read_record(paths.attempt(number).process, ProcessRecord).pid, why)
