"""What earlier runs of a model measured: how fast its steps are, and what a run spends beside them.

Read from run directories alone: ``plan.json`` says what a run is, its attempts' records how long things took.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from encdec.errors import ConfigError, EncdecError
from encdec.files import AttemptPaths, RunPaths
from encdec.records import is_step, read_ends, read_newest
from launchers.chain_file import CHAIN_FILE, runs_of
from launchers.planning.forecast import Measured

NEWEST_RUNS = 50
"""Looked at, at most."""
UNSTEADY_STEPS = 2
"""At the start of an attempt, that say nothing about the others: caches fill, kernels are compiled."""
LEAST_STEPS = 5
"""Steady ones, without which an attempt says nothing."""
BYTES_OF_RECORDS = 1 << 19
"""Read from the end of an attempt's records: some 1,500 steps."""
SAME = ("parameters", "device", "gpu", "bytes_per_value", "activation_checkpointing", "sharding")
"""Facts of a plan's forecast without which another run's speed means nothing."""
ALIKE = ("sample_length", "micro_batch_size", "nodes", "ranks_per_node")
"""Facts of a plan: of several runs the one with the most in common is taken, then the newest."""


class EarlierRuns:
    """The earlier runs in some folders, read once for all the phases of a command.

    Args:
        places: folders of run directories.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self._runs = list(earlier_runs(places))
        self._measured: dict[Path, Measured | None] = {}

    def calibrate(self, plan: dict[str, Any]) -> Measured | None:
        """What the most similar of them measured; None where there is none.

        Args:
            plan: of the run that is to be foreseen, as ``plan.json`` has it.
        """
        likes = [(likeness(plan, other), paths) for paths, other in self._runs]  # the newest first, and so ranked
        ranked = sorted(((much, paths) for much, paths in likes if much is not None), key=lambda like: -like[0])
        return next((found for found in (self._measure(paths) for _, paths in ranked) if found), None)

    def _measure(self, paths: RunPaths) -> Measured | None:
        if paths.root not in self._measured:
            self._measured[paths.root] = measure(paths)
        return self._measured[paths.root]


def calibrate_from(plan: dict[str, Any], paths: RunPaths) -> Measured:
    """What a run that is named measured.

    Raises:
        ConfigError: it is of another model, device, precision or engine, or has measured nothing yet.
    """
    other = read_plan(paths)
    if other is None or likeness(plan, other) is None:
        theirs, ours = (facts_of(each) if each else "no plan with a forecast" for each in (other, plan))
        raise ConfigError(
            "--calibrate-from names a run of the same model, device, precision and engine",
            found=f"{paths.root} ({theirs}), for {ours}",
            remedy="Name another run, or leave it out: a fitting one is looked for",
        )
    measured = measure(paths)
    if measured is None:
        raise ConfigError(
            f"--calibrate-from names a run with an attempt of {LEAST_STEPS + UNSTEADY_STEPS} steps or more",
            found=str(paths.root),
            remedy="Name another run, or leave it out",
        )
    return measured


def earlier_runs(places: Sequence[Path]) -> Iterator[tuple[RunPaths, dict[str, Any]]]:
    """The newest runs that lie in ``places``, those of chains too, with their plans."""
    found: dict[Path, float] = {}
    for place in {place.absolute() for place in places}:
        for folder in folders_in(place):
            for paths in runs_in(folder):
                with contextlib.suppress(OSError):  # no run, or gone meanwhile
                    found[paths.root] = paths.plan.stat().st_mtime
    for root in sorted(found, key=lambda root: found[root], reverse=True)[:NEWEST_RUNS]:
        plan = read_plan(RunPaths(root))
        if plan is not None:
            yield RunPaths(root), plan


def runs_in(folder: Path) -> list[RunPaths]:
    """What may be run directories: the phases of a chain, or the folder itself; none of a chain that is damaged."""
    if not os.path.lexists(folder / CHAIN_FILE):
        return [RunPaths(folder)]
    try:
        return list(runs_of(folder).values())
    except (EncdecError, OSError):  # somebody else's, which is no reason to refuse this run
        return []


def folders_in(place: Path) -> list[Path]:
    """The folders in ``place``; none where it cannot be read."""
    try:
        with os.scandir(place) as entries:
            return [Path(entry) for entry in entries if entry.is_dir()]
    except OSError:
        return []


def read_plan(paths: RunPaths) -> dict[str, Any] | None:
    """``plan.json`` of a run; None where there is none that has a forecast."""
    plan = read_plain(paths.plan)
    return plan if isinstance(plan.get("forecast"), dict) else None


def read_plain(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; an empty one where there is none that is whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def facts_of(plan: dict[str, Any]) -> dict[str, Any]:
    return {name: plan["forecast"].get(name) for name in SAME}


def likeness(plan: dict[str, Any], other: dict[str, Any]) -> int | None:
    """How much two runs of the same model and device have in common, by their plans; None: they are not such."""
    if facts_of(plan) != facts_of(other) or plan["forecast"].get("parameters") is None:
        return None
    return sum(plan.get(name) == other.get(name) for name in ALIKE)


def measure(paths: RunPaths) -> Measured | None:
    """What a run's newest attempt with enough steps measured; None where there is none, or its records are damaged."""
    plan = read_plan(paths)
    if not plan or not plan["forecast"].get("flops_per_step"):
        return None
    try:
        for number in reversed(paths.attempt_numbers()):
            attempt = paths.attempt(number)
            steps = list(filter(is_step, read_newest(attempt.steps, BYTES_OF_RECORDS)))
            if len(steps) >= LEAST_STEPS + UNSTEADY_STEPS:
                found = measured_by(attempt, steps, plan, name=paths.root.name)
                return found if is_sound(found) else None
    # somebody else's damaged or closed files
    except (ArithmeticError, EncdecError, KeyError, OSError, TypeError, ValueError):
        return None
    return None


def is_sound(measured: Measured) -> bool:
    """Whether a forecast can rest on it: damaged records may hold words or infinities where numbers belong."""
    values = [value for name, value in asdict(measured).items() if name != "source" and value is not None]
    numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    return numbers and min(measured.step_seconds, measured.flops_per_second, measured.tokens_per_step) > 0


def measured_by(attempt: AttemptPaths, steps: list[dict[str, Any]], plan: dict[str, Any], *, name: str) -> Measured:
    """What the records of one attempt say; medians, which a step that waited for a slow disk does not move.

    Args:
        steps: its step records, oldest first.
    """
    steady = steps[UNSTEADY_STEPS:]
    within = statistics.median(step["step_seconds"] for step in steady)
    events = list(read_newest(attempt.events("rank-0"), BYTES_OF_RECORDS))
    saves = [event for event in events if event.get("event") == "saved"]
    stops = {event.get("step") for event in events if event.get("event") in ("evaluated", "saved")}
    # between two steps lie evaluation, the part of a save that blocks, and what observers do
    gaps = [
        (before["step"], gap_between(before, after)) for before, after in pairwise(steady) if follows(before, after)
    ]
    paused = [gap for step, gap in gaps if step in stops]
    others = [gap for step, gap in gaps if step not in stops]
    beside = max(0.0, statistics.median(others)) if others else 0.0
    began, ended = bounds_of(attempt)
    first = read_ends(attempt.steps)[0]
    ranks = plan["nodes"] * plan["ranks_per_node"]
    return Measured(
        source=name,
        steps=len(steady),
        step_seconds=within + beside,
        flops_per_second=plan["forecast"]["flops_per_step"] / within / ranks,
        startup_seconds=max(0.0, first["time"] - began - within) if began and first and is_step(first) else None,
        pause_seconds=max(0.0, statistics.median(paused) - beside) if paused else 0.0,
        finish_seconds=max(0.0, ended - steps[-1]["time"]) if ended else None,
        blocking_seconds=statistics.median(s["blocking_seconds"] for s in saves) if saves else None,
        save_seconds=statistics.median(s["seconds"] for s in saves) if saves else None,
        tokens_per_step=plan["tokens_per_step"],
        ranks=ranks,
        nodes=plan["nodes"],
    )


def follows(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether one step record comes right after another: neither a restart in place nor a roll-back lies between."""
    return after["restart"] == before["restart"] and after["step"] == before["step"] + 1


def gap_between(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Seconds between the end of one step and the beginning of the next."""
    return float(after["time"] - after["step_seconds"] - before["time"])


def bounds_of(attempt: AttemptPaths) -> tuple[float | None, float | None]:
    """When the attempt's process began and when its outcome was written, seconds since the epoch, as far as known."""
    began, outcome = read_plain(attempt.process).get("created"), read_plain(attempt.outcome)
    return began, outcome.get("time") if outcome.get("cause") == "complete" else None
