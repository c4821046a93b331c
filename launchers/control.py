"""What a person does to a run's life: cancel it, or have it save and start again."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace

import psutil

from encdec.errors import ConfigError, EncdecError
from encdec.files import AttemptPaths, RunPaths
from encdec.records import ProcessRecord, read_json_lines, read_record
from encdec.training.run_config import read_run_config
from launchers import local, remote, slurm
from launchers.chain_file import earlier_phases, label
from launchers.jobs import jobs_of, submission
from launchers.launch_options import measured_stop_seconds, read_launch_options, why_given_up
from launchers.nodes.continuation import past_attempts
from launchers.run_directory import note, usable
from launchers.run_status import SECONDS_TO_BELIEVE_DEAD, only_starter, read_status, seconds_since_heartbeat

AGAIN = "the same submit command continues it"


@contextlib.contextmanager
def nobody_starting(paths: RunPaths) -> Iterator[None]:
    """Nobody submits the run meanwhile, and a job is known whose launcher died before it could write down the id."""
    with usable(paths), only_starter(paths):
        submitted = submission(paths)
        if submitted and submitted.job is None:
            remote.reconcile(paths, read_run_config(paths))
        yield


# ---- cancel


def cancel(paths: RunPaths, *, now: bool) -> list[str]:
    """End what lives of a run, and say what that means, a line each; none if nothing lives.

    Args:
        now: without saving.

    Raises:
        ConfigError: it runs on another machine, outside Slurm.
        EncdecError: it cannot be ended from here.
    """
    with nobody_starting(paths):
        status = read_status(paths)
        if not status.attempts and (running := phase_in_the_same_job(paths)):
            paths.control.mkdir(exist_ok=True)
            paths.stop_request.touch()
            said = [f"does not begin: the job that runs {running} comes to it no more; {AGAIN}"]
        elif status.host is None:
            said = cancel_jobs(paths, now=now)
        elif status.running:
            said = [cancel_local(paths, status.attempts[-1], now=now)]
        else:
            raise ConfigError(
                "A run outside Slurm is cancelled on the machine where it runs",
                found=f"attempt {status.attempts[-1]} on {status.host}",
                remedy=f"Give the command there, or touch {paths.stop_request}, which saves and stops it from anywhere",
            )
        if said:
            note(paths, "cancelled", now=now, said=said)
    return said


def phase_in_the_same_job(paths: RunPaths) -> str | None:
    """The earlier phase of a chain in one allocation whose job is the run's, too: it is that one's to end the job."""
    jobs = [job for job, _ in live_jobs(paths)]
    earlier = [run for run in earlier_phases(paths).values() if set(jobs) & set(jobs_of(run))]
    return label(earlier[0]) if earlier else None


def cancel_local(paths: RunPaths, number: int, *, now: bool) -> str:
    try:
        if now:
            kill(read_record(paths.attempt(number).process, ProcessRecord))
            return f"attempt {number} is killed; from its newest checkpoint {AGAIN}"
        local.ask_to_stop(paths, number, signal.SIGTERM)
    except (PermissionError, psutil.AccessDenied):
        raise EncdecError(
            "A run is cancelled by the user who runs it",
            found=f"attempt {number} of another user",
            remedy=f"Touch {paths.stop_request}, if you may: it saves and stops",
        ) from None
    return f"attempt {number} finishes its step, saves and ends; {AGAIN}"


def kill(record: ProcessRecord) -> None:
    """End an attempt's agent and all below it at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        agent = psutil.Process(record.pid)
        agent.suspend()  # it starts nothing any more
        victims = [*agent.children(recursive=True), agent]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        psutil.wait_procs(victims, timeout=10)


def cancel_jobs(paths: RunPaths, *, now: bool) -> list[str]:
    """The successor goes first, or it would start; one that is queued meanwhile is found by looking again."""
    said: dict[str, str] = {}
    while live := [one for one in live_jobs(paths) if one[0] not in said]:
        paths.control.mkdir(exist_ok=True)
        paths.stop_request.touch()  # whatever brings a job back, its ranks leave at their first step
        for job, state in reversed(live):
            said[job] = cancel_job(paths, job, state, now=now)
    return list(said.values())


def live_jobs(paths: RunPaths) -> list[tuple[str, slurm.JobState]]:
    """The run's jobs that have not ended, as far as anybody knows; the one that runs it first."""
    jobs = jobs_of(paths)
    states = slurm.job_states(jobs)
    return [(job, states[job]) for job in jobs if not states[job].ended]


def cancel_job(paths: RunPaths, job: str, said: slurm.JobState, *, now: bool) -> str:
    """A save that takes longer than Slurm leaves a cancelled job is left to the request to stop."""
    needed, given = stop_seconds(paths, job), slurm.kill_wait()
    if not now and said.state == "RUNNING" and needed and given and needed > given:
        return (
            f"job {job} saves and ends by itself: a stop took up to {needed:.0f} s so far, and Slurm kills a cancelled "
            f"job after {given:.0f} s; --now ends it at once; {AGAIN}"
        )
    problem = slurm.kill(job) if now else slurm.cancel(job)
    if problem:
        raise EncdecError(
            "Slurm must cancel the run's jobs",
            found=f"job {job} ({said.state}): {problem}",
            remedy="Give the command again where Slurm answers and as the user who submitted; the run has been asked "
            "to stop through its directory all the same",
        )
    if said.state == "PENDING":
        return f"job {job}, which was waiting, is cancelled; {AGAIN}"
    if now:
        return f"job {job} is cancelled and killed; from its newest checkpoint {AGAIN}"
    return f"job {job} is cancelled: it finishes its step, saves and ends, nothing is requeued; {AGAIN}"


def stop_seconds(paths: RunPaths, job: str) -> float | None:
    """What a stop of the attempt that the job runs may take; None if it runs none."""
    return measured_stop_seconds(paths) if running_attempt(paths, job) is not None else None


def running_attempt(paths: RunPaths, job: str) -> int | None:
    """Number of the attempt that the job runs now."""
    number = paths.newest_attempt()
    attempt = None if number is None else paths.attempt(number)
    if attempt is None or attempt.outcome.is_file() or not attempt.process.is_file():
        return None
    return number if read_record(attempt.process, ProcessRecord).job == job else None


# ---- save


def save(paths: RunPaths) -> str:
    """Have a run save at its next step boundary and go on; says what that means.

    Raises:
        ConfigError: none of its attempts is there to see the request.
    """
    number = paths.newest_attempt()
    why_not = "one that has not begun" if number is None else why_it_cannot_save(paths, number)
    if why_not:
        raise ConfigError(
            "Only a run that trains can save", found=why_not, remedy="Start it with its submit command first"
        )
    with usable(paths):
        paths.control.mkdir(exist_ok=True)
        paths.save_request.touch()
        note(paths, "save_asked", attempt=number)
    return f"attempt {number} saves at its next step boundary and goes on"


def why_it_cannot_save(paths: RunPaths, number: int) -> str | None:
    """What is known of an attempt that does not train any more; None of one that does."""
    attempt = paths.attempt(number)
    if attempt.outcome.is_file():
        return f"attempt {number}, which has ended"
    ago = seconds_since_heartbeat(attempt)
    return f"attempt {number}, not heard of for {ago:.0f} s" if ago > SECONDS_TO_BELIEVE_DEAD else None


# ---- requeue


def requeue(paths: RunPaths, *, now: bool, remedy: str) -> str:
    """Have the run's job save and start again, or start at once if it waits; says what that means.

    Args:
        now: Slurm ends it itself, whether it has saved or not.
        remedy: what to do where no job of it lives, as a sentence.

    Raises:
        ConfigError: no job of it lives, or it could not start again.
        EncdecError: Slurm will not.
    """
    with nobody_starting(paths):
        live = live_jobs(paths)
        if not live:
            raise ConfigError(
                "Only a run that runs or waits on Slurm is requeued", found=where_instead(paths), remedy=remedy
            )
        job, said = live[0]
        if said.state == "PENDING":
            words = release(job, said)
        elif now:
            require(slurm.requeue(job), job, said)
            words = (
                f"job {job} is requeued by Slurm, which kills it after KillWait whether it has saved or not; it starts "
                "again after the hold-off, which the same command lifts"
            )
        else:
            require_ready(paths, job)
            require_another_start(paths)
            require(slurm.warn(job), job, said)
            words = (
                f"job {job} finishes its step and saves; then it is requeued or its successor starts. A requeued job "
                "waits for Slurm's hold-off, which the same command lifts"
            )
        note(paths, "requeue_asked", job=job, now=now, said=words)
    return words


def where_instead(paths: RunPaths) -> str:
    status = read_status(paths)
    return "a run without a live job" if status.host is None else f"one that runs on {status.host}, outside Slurm"


def release(job: str, said: slurm.JobState) -> str:
    """Let a job that waits start as soon as there is room."""
    require(slurm.start_now(job, held=said.held), job, said)
    if said.held or said.reason == "BeginTime":
        return f"job {job}, which waited for {said.reason}, may start now"
    return f"job {job} waits already ({said.reason}) and starts by itself"


def require(problem: str | None, job: str, said: slurm.JobState) -> None:
    """Slurm must have done what it was asked.

    Raises:
        EncdecError: with its words.
    """
    if problem:
        raise EncdecError(
            "Slurm must do what the run's job is to do",
            found=f"job {job} ({said.state}): {problem}",
            remedy="Give the command again where Slurm answers and as the user who submitted",
        )


def require_ready(paths: RunPaths, job: str) -> None:
    """The signal would kill agents that do not listen yet.

    Raises:
        ConfigError: not all of them do.
    """
    number = running_attempt(paths, job)
    nodes = read_run_config(paths).nodes
    ready = 0 if number is None else sum(listens(paths.attempt(number), node) for node in range(nodes))
    if ready < nodes:
        raise ConfigError(
            "A job can be asked to save once all its nodes listen",
            found=f"{ready} of {nodes} in job {job}",
            remedy="Give the command again in a moment, or with --now",
        )


def listens(attempt: AttemptPaths, node: int) -> bool:
    return any(record.get("event") == "agent_ready" for record in read_json_lines(attempt.events(f"node-{node}")))


def require_another_start(paths: RunPaths) -> None:
    """Asked to save by a signal, a job starts again only within the run's limits.

    Raises:
        ConfigError: this attempt is the last.
    """
    *before, this = past_attempts(paths)
    reason = why_given_up(read_launch_options(paths), [*before, replace(this, stopped=True)])
    if reason:
        raise ConfigError(
            "A run goes on by itself within its limits only",
            found=reason,
            remedy="Cancel it and submit it again with a greater --max-attempts, or give --now",
        )
