"""How runs stand: each one's records, and Slurm's word on the jobs of all of them together."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encdec.errors import EncdecError, GateNotPassed, RunDirectoryError
from encdec.files import AttemptPaths, RunPaths
from encdec.records import JobRecord
from encdec.training.execution import TrainingPhase
from encdec.training.promotion import GateFile, gate_path, phase_before, read_gate, require_passed
from encdec.training.run_config import RunConfig, read_run_config
from launchers.chain_file import label
from launchers.jobs import began_since_submission, newest_jobs, submission
from launchers.run_directory import usable
from launchers.run_status import host_of
from launchers.slurm import UNASKED, JobState, job_states
from launchers.views.growing_files import Memory
from launchers.views.history import AttemptView, files_of, read_attempt
from launchers.views.standing import CONTINUABLE, Standing, State, standing


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """What a run directory says."""

    phase: str
    total_steps: int
    attempts: list[AttemptView]
    """Oldest first."""
    host: str | None
    """The machine on which an attempt runs outside Slurm."""
    jobs: list[str]
    """Those whose state matters, the one that runs the run first; none once it is complete."""
    cancelled: bool
    """Whether the run's own records say that a user cancelled what it did last."""
    unanswered: bool
    """Whether sbatch never answered to the newest submission."""
    command: str | None
    """The submit command given last, with its directory."""
    heartbeats: Mapping[int, float]
    """The newest attempt's newest sign of life of each node, seconds since the epoch, by node rank."""
    checkpoint: str | None
    """Name of the newest checkpoint."""
    checkpoint_time: float | None
    gate: GateFile | None
    """The verdict on its phase; None before there is one."""
    after: str | None
    """The phase for whose gate it waits; None where it may begin, or has begun."""
    not_started: str | None
    """Why it will not start by itself; None where nothing says so."""

    @property
    def newest(self) -> AttemptView | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def heartbeat(self) -> float | None:
        """Of all nodes the newest sign of life, seconds since the epoch."""
        return max(self.heartbeats.values(), default=None)

    @property
    def position(self) -> AttemptView | None:
        """The newest attempt that did a step."""
        return next((attempt for attempt in reversed(self.attempts) if attempt.last_step is not None), None)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run as a person is told of it."""

    name: str
    directory: str
    standing: Standing
    records: RunRecords | None
    """None: damaged."""
    job: JobState | None
    """What Slurm says of the job that the standing is about."""

    @property
    def next_command(self) -> str | None:
        """What continues the run; None where nothing would."""
        if self.records is None or self.standing.state not in CONTINUABLE:
            return None
        return self.records.command or "the same submit command"

    @property
    def instead_of_requeue(self) -> str:
        """What to do with a run that has no job to be requeued, as a sentence."""
        if self.next_command:
            return f"Start it again: {self.next_command}"
        if self.standing.state is State.RUNNING:
            return f"python -m launchers.cancel {self.name}, then the same submit command on a cluster"
        return f"python -m launchers.status {self.name} says why it ended: {self.standing.words}"


def look(
    runs: Sequence[RunPaths], *, forgiving: bool, ask: Callable[[list[str]], Mapping[str, JobState]] = job_states
) -> list[RunView]:
    """How each of the runs stands; Slurm is asked once for all.

    Args:
        ask: what Slurm says of these jobs.

    Raises:
        EncdecError: one of them is damaged, unless ``forgiving``, which makes that its standing.
    """
    read = [read_or_damage(paths, Memory()) for paths in runs]
    if not forgiving:
        for damage in read:
            if isinstance(damage, EncdecError):
                raise damage
    states = ask([job for one in read if isinstance(one, RunRecords) for job in one.jobs])
    return [view(paths, one, states) for paths, one in zip(runs, read, strict=True)]


def read_or_damage(paths: RunPaths, memory: Memory) -> RunRecords | EncdecError:
    """A run's records, or what is wrong with them: one odd line must not hide all other runs."""
    try:
        with usable(paths):
            return read_records(paths, memory)
    except EncdecError as damage:
        return damage
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as odd:
        return RunDirectoryError(
            "Every line of a run's ledgers has the facts of its kind",
            found=f"one in {paths.root} that has not ({type(odd).__name__}: {odd})",
            remedy="Mend or delete that line in events.jsonl or in the events-*.jsonl of an attempt",
        )


def view(paths: RunPaths, read: RunRecords | EncdecError, states: Mapping[str, JobState]) -> RunView:
    """Pure: a run's records and Slurm's words -> the verdict."""
    name, directory = label(paths), str(paths.root)
    if isinstance(read, EncdecError):
        damaged = Standing(State.DAMAGED, f"damaged: {read.found}")
        return RunView(name=name, directory=directory, standing=damaged, records=None, job=None)
    jobs = {job: states.get(job, JobState(UNASKED)) for job in read.jobs}
    verdict = standing(
        read.newest,
        jobs,
        host=read.host,
        here=read.host == socket.gethostname(),
        cancelled=read.cancelled or any(said.state == "CANCELLED" for said in jobs.values()),
        unanswered=read.unanswered,
        after=read.after,
        not_started=read.not_started,
    )
    said = jobs.get(verdict.job) if verdict.job else None
    return RunView(name=name, directory=directory, standing=verdict, records=read, job=said)


def read_records(paths: RunPaths, memory: Memory) -> RunRecords:
    """Read a run directory. Asks nobody.

    Args:
        memory: what has been read of the directory before.

    Raises:
        RunDirectoryError: damaged.
        OSError: not readable.
    """
    run = memory.recall((paths.run_yaml,), lambda: read_run_config(paths))
    attempts = [recall_attempt(number, paths.attempt(number), memory) for number in paths.attempt_numbers()]
    newest = attempts[-1] if attempts else None
    submitted = memory.recall((paths.job,), lambda: submission(paths))
    place = paths.attempt(newest.number) if newest else None
    ended_well = newest is not None and newest.cause == "complete"
    local = newest is not None and newest.job is None and began_since_submission(newest.began, submitted)
    ledger = memory.ledger(paths.events)
    checkpoint = paths.newest_checkpoint()
    return RunRecords(
        phase=str(run.phase.phase) if run.phase else "training",
        total_steps=run.num_train_steps,
        attempts=attempts,
        host=host_of(place) if place and newest and newest.cause is None else None,
        jobs=[] if ended_well or local else memory.recall((paths.continuation, paths.job), lambda: newest_jobs(paths)),
        cancelled=was_cancelled(newest, submitted, ledger),
        unanswered=submitted is not None and submitted.job is None and not local,
        command=submit_command(ledger),
        heartbeats=heartbeats_of(place) if place else {},
        checkpoint=checkpoint.name if checkpoint else None,
        checkpoint_time=newest_change([checkpoint]) if checkpoint else None,
        gate=recall_gate(paths, run.phase.phase, memory) if run.phase else None,
        after=waits_for(paths, run) if newest is None else None,
        not_started=why_not_started(ledger) if newest is None else None,
    )


def recall_attempt(number: int, place: AttemptPaths, memory: Memory) -> AttemptView:
    return memory.recall(files_of(place), lambda: read_attempt(number, place, memory))


def recall_gate(paths: RunPaths, phase: TrainingPhase, memory: Memory) -> GateFile | None:
    return memory.recall((paths.gates, gate_path(paths, phase)), lambda: read_gate(paths, phase))


def heartbeats_of(place: AttemptPaths) -> dict[int, float]:
    """The newest sign of life of each node of an attempt, seconds since the epoch, by node rank."""
    times = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(place.root) as entries:
        for entry in entries:
            node = entry.name.removeprefix("heartbeat-")
            if node != entry.name and node.isdecimal():
                times[int(node)] = entry.stat().st_mtime
    return dict(sorted(times.items()))


def waits_for(paths: RunPaths, run: RunConfig) -> str | None:
    """The phase whose gate a run needs and that has not passed it yet."""
    start, phase = run.starts_from, run.phase
    if start is None or start.kind != "gate" or phase is None:
        return None
    try:
        require_passed(start, phase.phase)
        return None
    except GateNotPassed:
        return str(phase_before(phase.phase))


def why_not_started(ledger: Sequence[Mapping[str, Any]]) -> str | None:
    """What the run's ledger says since the newest submission."""
    last: Mapping[str, Any] = next(
        (record for record in reversed(ledger) if record.get("event") in ("not_started", "submitted")), {}
    )
    return last.get("why")


def was_cancelled(newest: AttemptView | None, submitted: JobRecord | None, ledger: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the attempt or the submission that came last was cancelled, as its own ledger or the run's says."""
    if newest and newest.cancelled and began_since_submission(newest.began, submitted):
        return True
    since = max(newest.began or 0.0 if newest else 0.0, submitted.submitted if submitted else 0.0)
    times = [record.get("time") for record in ledger if record.get("event") == "cancelled"]
    return any(isinstance(moment, int | float) and moment > since for moment in times)


def submit_command(ledger: Sequence[Mapping[str, Any]]) -> str | None:
    """The submit command given last, with the directory it was given in."""
    for record in reversed(ledger):
        directory, text = record.get("directory"), record.get("text")
        if record.get("event") == "command" and isinstance(directory, str) and isinstance(text, str):
            return f"cd {shlex.quote(directory)} && {text}"
    return None


def newest_change(files: Iterable[Path]) -> float | None:
    """The newest time of modification, seconds since the epoch; None without files."""
    times = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # a checkpoint may have been rotated away meanwhile
            times.append(file.stat().st_mtime)
    return max(times, default=None)
