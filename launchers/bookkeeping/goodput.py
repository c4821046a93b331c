"""What the ETTR formula says of a run, by the run's own measurements: beside what its ledger has counted. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from encdec.reliability import expected_ettr, share_of_jobs
from launchers.bookkeeping.ledger import PLANNED, STARTING, Ledger, Part, sum_parts
from launchers.bookkeeping.run_story import RunStory


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What the formula needs to know of a run, measured; seconds."""

    interval: float
    """Of training between two checkpoints."""
    mean_time_to_interrupt: float
    """Between failures, time in the queue left out; infinite where there was none."""
    blocking: float
    """For which training stood still at a checkpoint."""
    commit: float
    """From the end of that until the checkpoint was committed."""
    recovery: float
    """From a failure to the next step; 0 where there was none."""
    job: float
    """Of one job, from its start to its planned end."""
    startup: float
    """Of a job until its first step, where no failure came before it."""
    stop: float
    """Of a job from its last step to its end."""
    queue: float
    """For which a job waited, where no failure came before it."""


def measure(ledger: Ledger, story: RunStory) -> Circumstances | None:
    """What befell the run; None before its first step."""
    totals, failures = ledger.totals, ledger.failures
    running = ledger.wall - totals[Part.QUEUE]
    worked = totals[Part.TRAINING] + totals[Part.EVALUATION] + totals[Part.BETWEEN_STEPS] + totals[Part.LOST]
    if not ledger.steps + ledger.lost_steps or worked <= 0:
        return None
    recoveries = [each.recovery_seconds for each in failures if each.recovery_seconds]
    saves = [save for attempt in story.attempts for save in attempt.saves]
    planned = sum_parts(span for span in ledger.spans if span.cause in PLANNED)
    jobs = 1 + sum(each.cause in PLANNED for each in ledger.interruptions)
    return Circumstances(
        interval=worked / max(1, len(saves)),
        mean_time_to_interrupt=running / len(failures) if failures else math.inf,
        blocking=totals[Part.SAVE_STALL] / max(1, len(saves)),
        commit=fmean(save.seconds - save.blocking_seconds for save in saves) if saves else 0.0,
        recovery=fmean(recoveries) if recoveries else 0.0,
        job=(running - sum(recoveries)) / jobs,
        startup=sum(planned[part] for part in STARTING) / jobs,
        stop=totals[Part.CLOSING] / jobs,
        queue=planned[Part.QUEUE] / jobs,
    )


def predict(found: Circumstances) -> float:
    """ETTR by ``encdec.reliability``: of interrupts at random, times what is left of jobs by their planned ends."""
    ettr = expected_ettr(
        found.interval,
        found.mean_time_to_interrupt,
        blocking_seconds=found.blocking,
        recovery_seconds=found.recovery,
        commit_seconds=max(0.0, found.commit),
    )
    return ettr * share_of_jobs(
        found.job, startup_seconds=found.startup, stop_seconds=found.stop, queue_seconds=found.queue
    )
