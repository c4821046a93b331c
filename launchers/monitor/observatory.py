"""What is known of all runs now: their directories, read on at each look, and Slurm's words, asked for seldom."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from encdec.errors import EncdecError
from encdec.files import RunPaths
from launchers.run_status import SECONDS_TO_BELIEVE_DEAD
from launchers.slurm import JobState
from launchers.views.growing_files import Memory
from launchers.views.overview import RunRecords, RunView, read_or_damage, view
from launchers.views.slurm_watch import SlurmWatch
from launchers.views.standing import State
from launchers.views.utilization import Work, read_work
from launchers.views.vitals import Pulse, Vitals

SECONDS_WITHOUT_A_STEP = 300.0
STEPS_OF_SILENCE = 20
"""A run is called stuck after this many steps' time without one, and SECONDS_WITHOUT_A_STEP at least."""
LIVE_FIRST = (State.RUNNING, State.UNKNOWN, State.PENDING)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """One run as the monitor sees it."""

    view: RunView
    vitals: Vitals
    work: Work | None = None
    """What its plan says of a step and its GPUs."""

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization of the newest steps, 0 to 1; None where the work or the GPUs are not known."""
        return self.work.mfu(self.vitals.step_seconds) if self.work else None

    @property
    def lives(self) -> bool:
        """Whether an attempt of it may train right now."""
        newest = self.view.records.newest if self.view.records else None
        return self.view.standing.state in (State.RUNNING, State.UNKNOWN) and bool(newest and newest.cause is None)

    @property
    def seconds_left(self) -> float | None:
        """Until its last step, while it runs."""
        records = self.view.records
        return self.vitals.seconds_left(records.total_steps) if self.lives and records else None

    def silent_nodes(self, now: float) -> dict[int, float]:
        """Seconds since each node was heard of that has been silent for too long, by node rank, while the run lives."""
        beats = self.view.records.heartbeats if self.lives and self.view.records else {}
        return {node: now - beat for node, beat in beats.items() if now - beat > SECONDS_TO_BELIEVE_DEAD}

    def seconds_stuck(self, now: float) -> float | None:
        """Since its last step, while it lives and should have done another long ago; None otherwise.

        A checkpoint and an entry of rank 0's ledger are signs of progress, too: saves and evaluations take their time.
        After the last step there is no other to wait for: the last save, the evaluation and the gate come then.
        """
        records, step = self.view.records, self.vitals.time
        newest = records.newest if records else None
        if not self.lives or records is None or newest is None or newest.last_step is None or step is None:
            return None
        if (self.vitals.step or 0) >= records.total_steps:
            return None
        bound = max(SECONDS_WITHOUT_A_STEP, STEPS_OF_SILENCE * (self.vitals.step_seconds or 0.0))
        progress = max(step, newest.last_entry or 0.0, records.checkpoint_time or 0.0)
        return now - step if now - progress > bound else None


@dataclass(frozen=True, kw_only=True)
class Board:
    """All runs at one moment."""

    now: float
    """Seconds since the epoch."""
    sights: Sequence[Sight]
    """Those that live first, then by name."""
    slurm_asked: float | None
    """When Slurm answered or failed to, seconds since the epoch; None: it has not been asked."""
    slurm_problem: str | None
    """Why its controller did not answer; None if it did."""
    trouble: str | None = None
    """Why the runs could not be listed."""


class Observatory:
    """Looks at runs again and again.

    Args:
        find: which run directories there are.
        slurm: asked by ``ask_slurm`` alone.
        clock: seconds since the epoch.
    """

    def __init__(
        self, find: Callable[[], Sequence[RunPaths]], slurm: SlurmWatch, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._find, self.slurm, self._clock = find, slurm, clock
        self._known: dict[RunPaths, tuple[Memory, Pulse]] = {}
        self._jobs: list[str] = []

    def look(self) -> Board:
        """Read what is new in the run directories; asks nobody."""
        try:
            runs, trouble = self._find(), None
        except (EncdecError, OSError) as error:
            runs, trouble = (), str(error)
        known = {paths: self._known.get(paths) or (Memory(), Pulse(paths)) for paths in runs}
        self._known = known  # those that are gone are forgotten
        read = {paths: read_or_damage(paths, memory) for paths, (memory, _) in known.items()}
        self._jobs = [job for one in read.values() if isinstance(one, RunRecords) for job in one.jobs]
        listing = self.slurm.listing
        sights = [sight(paths, one, listing.states, *known[paths]) for paths, one in read.items()]
        return Board(
            now=self._clock(),
            sights=sorted(sights, key=attention),
            slurm_asked=self.slurm.asked,
            slurm_problem=listing.problem,
            trouble=trouble,
        )

    def ask_slurm(self) -> bool:
        """Ask for the jobs of the last look, if it is time; whether Slurm was asked."""
        return self.slurm.ask_if_due(self._jobs)


def sight(
    paths: RunPaths, read: RunRecords | EncdecError, states: Mapping[str, JobState], memory: Memory, pulse: Pulse
) -> Sight:
    """One run's records, Slurm's words and its steps together."""
    attempts = [one.number for one in read.attempts] if isinstance(read, RunRecords) else []
    try:
        vitals = pulse.look(attempts)
    except OSError:
        vitals = Vitals()  # its folder is being taken away, or closed to us: the records say so, now or next time
    work = memory.recall((paths.plan,), lambda: read_work(paths.plan))
    return Sight(view=view(paths, read, states), vitals=vitals, work=work)


def attention(one: Sight) -> tuple[int, str]:
    """What lives goes first."""
    state = one.view.standing.state
    return LIVE_FIRST.index(state) if state in LIVE_FIRST else len(LIVE_FIRST), one.view.name
