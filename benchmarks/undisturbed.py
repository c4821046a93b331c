"""The run of the proof over kills, and what it comes to when nobody disturbs it."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import CONFIG
from benchmarks.small_agent import RANKS, Agent, BrokenChainError
from encdec.checkpoints import TRAINER_STATE, CheckpointManager, logical_digest
from encdec.files import RunPaths
from encdec.records import RankResult, read_json_lines, read_record, read_steps
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import resolve_run

STEPS, SAVE_STEPS = 60, 4
KEPT = 3
AVERAGE = "digest of the average"
SETTINGS = (
    f"training.num_train_steps={STEPS}",
    f"training.save_steps={SAVE_STEPS}",
    "training.eval_steps=1",  # so that every step that is saved on request is evaluated, and saved again, later
    "training.eval_samples=8",
    "training.early_stopping_enabled=false",
)
OF_THE_RUN = ("step", "loss", "grad_norm", "learning_rate", "tokens_seen", "samples_consumed")
"""Values of a step record that do not depend on the machine."""


@dataclass(frozen=True)
class Twin:
    """What the run comes to that nobody disturbs."""

    paths: RunPaths
    digests: dict[int, str]
    """Logical digest of the checkpoint of every step that is saved by schedule."""
    end: dict[str, Any]
    """All that must be the same at the end of any other run."""
    seconds: float
    """From the start of its ranks to their end."""


def make_run(
    root: Path, packed: Path, *settings: str, kept: int = KEPT, ranks: int = RANKS, like: RunPaths | None = None
) -> RunPaths:
    """A run directory before its first attempt; the sanity check counts as done where that of ``like`` is."""
    paths = RunPaths(root)
    paths.make()
    settings = (*SETTINGS, f"data.packed_dir={packed}", f"training.save_total_limit={kept}", *settings)
    run = resolve_run(TrainingPhase.SANITY_CHECK, config_file=CONFIG, settings=settings, ranks_per_node=ranks)
    run.write(paths.run_yaml)
    if like:
        shutil.copy(like.sanity_report, paths.sanity_report)
    return paths


def run_undisturbed(paths: RunPaths, ranks: int = RANKS) -> float:
    """Run to the end; returns the seconds it took.

    Raises:
        BrokenChainError: it did not end well.
    """
    agent, began = Agent(paths, ranks), time.monotonic()
    try:
        agent.start_ranks(None)
        codes = agent.codes()
        if codes is None or any(codes):
            raise BrokenChainError(f"{paths.root}: nobody disturbed it, and its ranks ended with {codes}")
        agent.end()
    finally:
        agent.kill_all()
    return time.monotonic() - began


def make_twin(folder: Path, packed: Path, *settings: str) -> Twin:
    """Run it twice: once keeping every checkpoint, for their digests, once as the others will be."""
    every = make_run(folder / "every-checkpoint", packed, *settings, kept=STEPS)
    run_undisturbed(every)
    digests = {info.step: logical_digest(every.checkpoints / info.checkpoint_id) for info in listed(every)}
    paths = make_run(folder / "twin", packed, *settings, like=every)
    seconds = run_undisturbed(paths)
    return Twin(paths, digests, end_of(paths), seconds)


def listed(paths: RunPaths) -> list[Any]:
    return CheckpointManager(paths.checkpoints).list_checkpoints()


def records_of(paths: RunPaths) -> list[dict]:
    """The step records of all attempts, in order."""
    return [record for number in paths.attempt_numbers() for record in read_steps(paths.attempt(number).steps)]


def end_of(paths: RunPaths) -> dict[str, Any]:
    """All that a complete run comes to and that must not depend on whether it was disturbed."""
    attempts = [paths.attempt(number) for number in paths.attempt_numbers()]
    told = [entry for attempt in attempts for entry in read_json_lines(attempt.events("rank-0"))]
    result = read_record(attempts[-1].result, RankResult)
    last = listed(paths)[-1]
    average = paths.checkpoints / f"average-{last.step}"
    gate = json.loads((paths.gates / "sanity_check.json").read_text())
    return {
        "digest of the last checkpoint": logical_digest(paths.checkpoints / last.checkpoint_id),
        AVERAGE: logical_digest(average) if average.exists() else None,
        "step and metrics of the last checkpoint": (last.step, last.metrics),
        "state of the trainer": json.loads((paths.checkpoints / last.checkpoint_id / TRAINER_STATE).read_text()),
        "steps": {record["step"]: [record[name] for name in OF_THE_RUN] for record in records_of(paths)},
        "evaluations": {e["step"]: (e["loss"], e["perplexity"]) for e in told if e["event"] == "evaluated"},
        "result": result.to_json(),
        # by its identity a run says how it saves, too, and some of these save otherwise than their twin
        "gate": {name: value for name, value in gate.items() if name not in ("time", "identity")},
    }


def differences(paths: RunPaths, twin: Twin, *, warned: bool = False) -> list[str]:
    """In what a complete run differs from its twin, one line each.

    Args:
        warned: it was asked to stop as it ended, and may have left without its average.
    """
    end = end_of(paths)
    if warned and end[AVERAGE] is None:
        end[AVERAGE] = twin.end[AVERAGE]
    found = [f"{name} differs from the twin's" for name, value in twin.end.items() if end[name] != value]
    kept, wanted = ({info.checkpoint_id for info in listed(each)} for each in (paths, twin.paths))
    if not kept >= wanted:  # one more is there where the last kill came before the last deletion
        found.append(f"{sorted(wanted - kept)} should have been kept")
    left = sorted(path.name for path in paths.checkpoints.iterdir() if re.search(r"\.tmp", path.name))
    return found + [f"{name} was left behind" for name in left]
