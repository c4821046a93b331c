"""Runs as Prometheus sees them (https://prometheus.io/docs/practices/naming): gauges with the run's name and phase.

A value that is not known is left out. Ages are as of the look; ``*_timestamp_seconds`` grow old by themselves.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from encdec.files import RunPaths
from encdec.records import read_last_steps
from launchers.slurm import JobState
from launchers.views.overview import RunView, look
from launchers.views.slurm_watch import SlurmWatch
from launchers.views.standing import State
from launchers.views.utilization import read_work

NEWEST_STEPS = 50
"""Over which throughput and MFU are measured."""
LABELS = ("run", "phase")
GAUGES = {
    "encdec_run_step": "Optimizer steps done",
    "encdec_run_total_steps": "Optimizer steps at which the run is complete",
    "encdec_run_loss": "Loss of the last step, nats per target token",
    "encdec_run_learning_rate": "Learning rate of the last step",
    "encdec_run_tokens_seen": "Raw corpus tokens consumed",
    "encdec_run_tokens_per_second": "Raw corpus tokens per second over the newest steps, all ranks",
    "encdec_run_mfu_ratio": "Model FLOPs utilization over the newest steps, 0 to 1",
    "encdec_run_data_wait_ratio": "Share of the newest steps' time spent waiting for data, 0 to 1",
    "encdec_run_checkpoint_timestamp_seconds": "When the newest checkpoint was committed, since the epoch",
    "encdec_run_checkpoint_age_seconds": "Age of the newest checkpoint at the look",
    "encdec_run_heartbeat_timestamp_seconds": "The newest attempt's last sign of life, since the epoch",
    "encdec_run_attempt": "Number of the newest attempt, from 0",
    "encdec_run_restarts": "In-place restarts of ranks, over all attempts",
    "encdec_run_gate_passed": "Whether the phase has passed its gate; absent before there is a verdict",
}
STATE, STATE_HELP = "encdec_run_state", "1 for the state that the run is in, 0 for the others"


@dataclass(frozen=True)
class Sample:
    """A run and what there is to say of it."""

    name: str
    phase: str
    state: State
    values: dict[str, float]
    """By the names of GAUGES."""


def sample(view: RunView, now: float) -> Sample:
    """A run's values at ``now``, seconds since the epoch."""
    records = view.records
    if records is None:
        return Sample(view.name, "", view.standing.state, {})
    paths = RunPaths(Path(view.directory))
    position, saved = records.position, records.checkpoint_time
    values: dict[str, float | None] = {
        "encdec_run_step": (position.last_step if position else None) or 0,
        "encdec_run_total_steps": records.total_steps,
        "encdec_run_checkpoint_timestamp_seconds": saved,
        "encdec_run_checkpoint_age_seconds": max(0.0, now - saved) if saved else None,
        "encdec_run_heartbeat_timestamp_seconds": records.heartbeat,
        "encdec_run_attempt": records.newest.number if records.newest else None,
        "encdec_run_restarts": sum(attempt.restarts for attempt in records.attempts),
        "encdec_run_gate_passed": None if records.gate is None else float(records.gate.passed),
    }
    if position:
        values |= of_steps(read_last_steps(paths.attempt(position.number).steps, NEWEST_STEPS), paths)
    known = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
    return Sample(view.name, records.phase, view.standing.state, known)


def of_steps(steps: list[dict[str, Any]], paths: RunPaths) -> dict[str, float | None]:
    """What the newest step records, oldest first, say; nothing without one."""
    if not steps:
        return {}
    seconds, last = fmean(step["step_seconds"] for step in steps), steps[-1]
    work = read_work(paths.plan)
    tokens = fmean(step["tokens_per_second"] * step["step_seconds"] for step in steps)
    return {
        "encdec_run_loss": last["loss"],
        "encdec_run_learning_rate": last["learning_rate"],
        "encdec_run_tokens_seen": last["tokens_seen"],
        "encdec_run_tokens_per_second": tokens / seconds if seconds else None,
        "encdec_run_mfu_ratio": work.mfu(seconds) if work else None,
        "encdec_run_data_wait_ratio": fmean(step["data_seconds"] for step in steps) / seconds if seconds else None,
    }


def families(samples: Iterable[Sample]) -> Iterator[Metric]:
    """One family a gauge, with the runs that have it."""
    samples = list(samples)
    for name, text in GAUGES.items():
        family = GaugeMetricFamily(name, text, labels=LABELS)
        for one in samples:
            if name in one.values:
                family.add_metric((one.name, one.phase), one.values[name])
        yield family
    states = GaugeMetricFamily(STATE, STATE_HELP, labels=(*LABELS, "state"))
    for one in samples:
        for state in State:
            states.add_metric((one.name, one.phase, str(state)), float(state is one.state))
    yield states


class Runs(Collector):
    """Looks at runs when it is asked, but not again within ``interval`` seconds of the last look's beginning, however
    many ask at the same time. A look asks the controller once, and accounting not again of jobs known to have ended.

    Args:
        find: the run directories there are.
    """

    def __init__(self, find: Callable[[], Sequence[RunPaths]], interval: float) -> None:
        self._find, self._interval = find, interval
        self._slurm = SlurmWatch(interval=0.0, clock=time.monotonic)  # asked at each look: they are seldom enough
        self._looking = threading.Lock()
        self._looked = -math.inf
        self._samples: list[Sample] = []

    def collect(self) -> Iterator[Metric]:
        with self._looking:
            began = time.monotonic()
            if began - self._looked >= self._interval:
                now = time.time()
                self._samples = [sample(view, now) for view in look(self._find(), forgiving=True, ask=self._ask)]
                self._looked = began  # only now: after a look that failed the next one is not put off
            return families(self._samples)

    def _ask(self, jobs: list[str]) -> Mapping[str, JobState]:
        self._slurm.ask_if_due(jobs)
        return self._slurm.listing.states


class Seen(Collector):
    """What another collector said.

    Args:
        metrics: its families.
    """

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)
