"""Follows a run on Slurm through its files and, seldom, squeue: through all requeues and successors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

from encdec.command_line import INTERRUPTED
from encdec.errors import EncdecError, ExitCode, RunDirectoryError
from encdec.files import RunPaths
from encdec.records import Outcome, ProcessRecord, read_record
from launchers import slurm
from launchers.jobs import LOOKS_TO_BELIEVE_AN_END, jobs_of
from launchers.views import show
from launchers.views.progress import Progress, make_console

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_SQUEUES = 30.0
PAUSES_AT_FIRST = (2.0, 4.0, 8.0, 16.0)
"""Seconds between the looks at a job that has claimed no attempt yet: many that die at all die at once."""
PAUSES_AT_LAST = (1.0, 2.0, 3.0, 4.0, 5.0, 5.0)
"""Seconds between the looks at jobs whose work is over."""
SECONDS_TO_BE_SEEN = 90.0
"""In which the files of a job that runs should show up here; NFS clients keep what they know for a minute."""
SECONDS_TO_LOOK_AGAIN = 5.0
"""After an end was seen for the first time."""


def follow(paths: RunPaths, *, total_steps: int) -> int:
    """Show progress until the run's work is over, through all its jobs; returns the last attempt's exit code.

    Asks squeue once in SECONDS_BETWEEN_SQUEUES, for jobs that die without a word, and a little more often after the
    submission and after a job's first start (PAUSES_AT_FIRST), until there is an attempt. Ctrl-C stops watching only.

    Raises:
        EncdecError: the job ended before it could claim an attempt.
    """
    watch = Watch(paths, total_steps)
    try:
        while not watch.over():
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        watch.close()
        show.queued(watch.job, paths)
        return INTERRUPTED
    watch.close()
    if watch.number is None and watch.unseen:
        raise RunDirectoryError(
            "The run directory must be visible on the nodes",
            found=f"{paths.root}, in which job {watch.job} ({watch.state}) has written nothing",
            remedy="Choose one on storage that all nodes share, with --run-dir; nothing is left in the queue",
        )
    if watch.number is None:
        raise EncdecError(
            "A job must live until its attempt begins",
            found=f"job {watch.job}, which ended {watch.state}",
            remedy="Nothing of it is left in the queue; give the same command again"
            if watch.state == "CANCELLED"
            else f"See its output in {paths.submitit}, then give the same command again",
        )
    return show.summary(paths, cancelled=watch.state == "CANCELLED")


def until_ended(runs: Iterable[RunPaths]) -> None:
    """Give the jobs of the runs the seconds that Slurm needs to end them (PAUSES_AT_LAST), so that whoever waited finds
    an empty queue. Their work is over, and a job that stays all the same is not waited for.
    """
    jobs = [job for paths in runs for job in jobs_of(paths)]
    with contextlib.suppress(KeyboardInterrupt):
        for pause in PAUSES_AT_LAST:
            if all(state.ended for state in slurm.job_states(jobs).values()):
                return
            time.sleep(pause)


class Watch:
    """What the run directory and, now and then, Slurm say about a run.

    Args:
        paths: the run directory.
        total_steps: steps at which the run is complete.
    """

    def __init__(self, paths: RunPaths, total_steps: int) -> None:
        self.number: int | None = None
        """Newest attempt that a job of the run has claimed since."""
        self.job = jobs_of(paths)[0]
        """The job that runs the run, as far as is known."""
        self.state = slurm.UNKNOWN
        self._paths, self._total = paths, total_steps
        self._view: Progress | None = None
        self.unseen = False
        """Whether the job has run, and its first node has written nothing."""
        self._ends_seen = 0
        self._running_since: float | None = None
        self._told_of_silence = False
        self._started: set[str] = set()
        """Jobs that have been seen to start."""
        self._next_squeue = 0.0
        self._pauses = iter(PAUSES_AT_FIRST)

    def over(self) -> bool:
        """Look once: whether an attempt ended for good, or Slurm says that none will follow."""
        self._look_at_files()
        outcome = self._outcome()
        if outcome is not None and outcome != ExitCode.CONTINUE_ME:
            return True
        if time.monotonic() >= self._next_squeue:
            self._look_at_slurm()
            self._look_for_its_host()
        return self._ends_seen >= LOOKS_TO_BELIEVE_AN_END

    def close(self) -> None:
        if self._view:
            self._view.close()

    def _look_at_files(self) -> None:
        newest = self._paths.newest_attempt()
        if newest != self.number and newest is not None and self._is_of_a_job(newest):
            self.close()
            self.number = newest
            self._view = Progress(self._paths.attempt(newest), self._total)
            self._view.say(f"job {self.job} runs attempt {newest}")
            self._pauses = iter(())
            self._started.add(self.job)
        elif self.job not in self._started and self._paths.batch_host(self.job).exists():
            self._pauses, self._next_squeue = iter(PAUSES_AT_FIRST[1:]), time.monotonic() + PAUSES_AT_FIRST[0]
            self._started.add(self.job)
        if self._view:
            self._view.refresh()

    def _is_of_a_job(self, number: int) -> bool:
        """Whether a live job of the run claimed the attempt; an older attempt's outcome is none of this one's."""
        process = self._paths.attempt(number).process
        job = read_record(process, ProcessRecord).job if process.is_file() else None
        if job is not None and job in jobs_of(self._paths):
            self.job = job
            return True
        return False

    def _outcome(self) -> int | None:
        if self.number is None or not self._paths.attempt(self.number).outcome.is_file():
            return None
        return read_record(self._paths.attempt(self.number).outcome, Outcome).exit_code

    def _look_for_its_host(self) -> None:
        """The first node of a job leaves its name in the run directory; a job that cannot ends by itself."""
        if self.number is not None or self._paths.batch_host(self.job).exists():
            self.unseen = False
        elif self.state == "RUNNING":
            self._running_since = self._running_since or time.monotonic()
            if time.monotonic() - self._running_since > SECONDS_TO_BE_SEEN and not self._told_of_silence:
                self._told_of_silence = True
                make_console().print(
                    f"job {self.job} is RUNNING, but has written nothing to {self._paths.root} yet: a slow prolog, or "
                    "storage that its node does not see"
                )
        elif self.state in slurm.END_STATES:
            self.unseen = self.state != "CANCELLED"

    def _look_at_slurm(self) -> None:
        states = {}
        for job in jobs_of(self._paths):  # the next one is asked for only if this one has ended
            states[job] = slurm.job_state(job)
            if states[job] not in slurm.END_STATES:
                break
        else:
            job = next(iter(states))
        state = states[job]
        ended = state in slurm.END_STATES
        self._ends_seen = self._ends_seen + 1 if ended else 0
        pause = SECONDS_TO_LOOK_AGAIN if ended else next(self._pauses, SECONDS_BETWEEN_SQUEUES)
        self._next_squeue = time.monotonic() + pause
        if (job, state) != (self.job, self.state) and (self._view is None or state != "RUNNING"):
            make_console().print(f"job {job} is {state}")
        self.job, self.state = job, state
