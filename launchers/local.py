"""Runs an attempt on this machine through submitit's local executor, and follows it through its files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

import submitit

from encdec.files import RunPaths
from encdec.training.run_config import RunConfig
from launchers import show
from launchers.job import RunPhase
from launchers.progress import Progress
from launchers.run_directory import code_environment, note, read_status

MINUTES_PER_YEAR = 365 * 24 * 60
SECONDS_TO_CLAIM = 60.0
SECONDS_BETWEEN_LOOKS = 0.1


def run_here(paths: RunPaths, run: RunConfig, *, wait: bool) -> int:
    """Start an attempt unless one runs, and follow it to its end; returns its exit code."""
    status = read_status(paths)
    if status.running:
        show.attached(paths)
    else:
        paths.stop_request.unlink(missing_ok=True)  # a request of last time must not stop this attempt
        note(paths, "submitted", cluster="local", attempt=status.attempts)
        start(paths, run)
    if not wait:
        return show.started(paths)
    follow(paths, total_steps=run.num_train_steps)
    return show.summary(paths)


def start(paths: RunPaths, run: RunConfig) -> None:
    """Hand ``RunPhase(run_dir)`` to submitit's local executor, running the code of the snapshot."""
    executor = submitit.LocalExecutor(folder=paths.submitit)
    executor.update_parameters(
        timeout_min=MINUTES_PER_YEAR,
        tasks_per_node=1,
        gpus_per_node=run.ranks_per_node if run.config.infra.device == "cuda" else 0,
        stderr_to_stdout=True,
    )
    attempts_before = len(paths.attempt_numbers())
    with job_environment(paths):
        job = executor.submit(RunPhase(str(paths.root)))
    deadline = time.monotonic() + SECONDS_TO_CLAIM
    while not identified(paths, attempts_before) and not job.done() and time.monotonic() < deadline:
        time.sleep(0.02)  # until the attempt is there to be followed


def identified(paths: RunPaths, attempts_before: int) -> bool:
    """Whether a new attempt has been claimed and says which process runs it."""
    numbers = paths.attempt_numbers()
    return len(numbers) > attempts_before and paths.attempt(numbers[-1]).process.is_file()


@contextlib.contextmanager
def job_environment(paths: RunPaths) -> Iterator[None]:
    """The snapshot goes first, and the job does not get the terminal's Ctrl-C (submitit would kill it)."""
    before = dict(os.environ)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(code_environment(paths))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        os.environ.clear()
        os.environ.update(before)


def follow(paths: RunPaths, *, total_steps: int) -> None:
    """Show progress until the newest attempt has ended. Ctrl-C asks it to save and stop; another stops following."""
    number = paths.newest_attempt()
    if number is None:
        return
    view = Progress(paths.attempt(number), total_steps)
    interrupts = 0

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1

    handler = signal.signal(signal.SIGINT, on_interrupt)
    try:
        asked = 0
        while read_status(paths).running and interrupts < 2:
            view.refresh()
            if interrupts > asked:
                asked = interrupts
                view.say("finishing the step, then saving; Ctrl-C again stops watching and lets the run go on saving")
                ask_to_stop(paths, number)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        view.refresh()
    finally:
        view.close()
        signal.signal(signal.SIGINT, handler)


def ask_to_stop(paths: RunPaths, number: int) -> None:
    """Send the attempt's agent the signal that means: finish the step, save, leave."""
    facts = json.loads(paths.attempt(number).process.read_text())
    with contextlib.suppress(ProcessLookupError):
        os.kill(facts["pid"], signal.SIGUSR2)
