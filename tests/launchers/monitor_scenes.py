"""Run directories as a monitor may find them, at a fixed moment, with what Slurm says of their jobs."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from encdec.files import RunPaths, atomic_write_json
from encdec.gates import GATES, GateLevel, Measurement
from encdec.records import JsonLinesWriter, ProcessRecord, event
from encdec.training.execution import TrainingPhase
from encdec.training.promotion import GateFile
from launchers.slurm import UNKNOWN, JobState, Listing
from tests.launchers.conftest import UNREACHABLE, Story, step_record

HOST = "laptop"
"""This machine's name, in a scene."""
NOW = psutil.Process().create_time() + 7230.5
"""Seconds since the epoch. All times of a scene, that of the process that a local run lives in too, are before it by a
fixed span, so that all ages are always the same.
"""


def steps(story: Story, first: int, last: int, *, ended: float, seconds: float = 0.5, seed: int = 0) -> None:
    """Steps of the newest attempt, the last of them done ``ended`` seconds ago."""
    noise = random.Random(seed)
    with JsonLinesWriter(story.newest.steps) as writer:
        for step in range(first, last + 1):
            record = replace(
                step_record(step),
                loss=2.0 + 8.0 / (1 + step / 12) + noise.random() / 5,
                step_seconds=seconds,
                data_seconds=seconds / 50,
                tokens_per_second=384 * 24 / seconds,
                time=NOW - ended - (last - step) * seconds,
            )
            writer.write(record.to_json())


def beat(story: Story, *ages: float) -> None:
    """Each node's last heartbeat, seconds ago."""
    for node, age in enumerate(ages):
        file = story.newest.heartbeat(node)
        file.touch()
        os.utime(file, (NOW - age, NOW - age))


def saved(story: Story, step: int, age: float) -> None:
    """A checkpoint, committed ``age`` seconds ago."""
    folder = story.paths.checkpoints / f"step-{step}"
    folder.mkdir(parents=True)
    os.utime(folder, (NOW - age, NOW - age))


def tell(story: Story, writer: str, kind: str, age: float, **facts: object) -> None:
    """An entry of the newest attempt's ledger, ``age`` seconds ago."""
    with JsonLinesWriter(story.newest.events(writer)) as ledger:
        ledger.write(event(kind, **facts) | {"time": NOW - age})


def begin(root: Path, name: str) -> Story:
    return Story(RunPaths(root / name), submitted=NOW - 7231.5).begin()


def on_slurm(root: Path, name: str, job: str) -> Story:
    """A run whose first attempt runs in a job."""
    story = begin(root, name)
    story.job(job)
    story.runs_in(job)
    story.attempt(job, host="n1")
    beat(story, 3.5)
    return story


def empty(root: Path) -> Listing:
    return Listing({}, None)


def one_local_run(root: Path) -> Listing:
    """In this very process; its attempt before was stopped by Ctrl-C."""
    story = begin(root, "sanity_check-ca1bf36f")
    story.attempt(host=HOST, pid=1)
    steps(story, 1, 12, ended=4000.5)
    story.end("signalled", 75)
    story.attempt(host=HOST)
    me = psutil.Process()
    process = ProcessRecord(host=HOST, pid=me.pid, created=me.create_time())
    atomic_write_json(story.newest.process, process.to_json())
    steps(story, 13, 42, ended=1.5)
    saved(story, 40, 3.5)
    beat(story, 4.5)
    tell(story, "rank-0", "alert", 21.5, type="loss_spike", step=20, value=9.1, threshold=2.0, occurrences=1,
         message="loss 9.1 is 2.4 times the mean of the window")  # fmt: skip
    return Listing({}, None)


def fifty_runs(root: Path) -> Listing:
    """Of all kinds."""
    states: dict[str, JobState] = {}
    for number in range(50):
        job, kind = str(1000 + number), number % 10
        story = on_slurm(root, f"medium-{number:02d}-{number * 7919 % 65536:04x}", job)
        if kind == 0:
            steps(story, 1, 60, ended=600.5, seed=number)
            story.end("complete", 0)
            continue
        steps(story, 1, 5 + number, ended=1.5 + number % 7, seconds=0.2 + number / 100, seed=number)
        saved(story, 5, 61.5 + 60 * number)
        beat(story, 3.5, 7.5)
        if kind == 1:
            story.end("crash", 1)
            states[job] = JobState("FAILED")
        elif kind == 2:
            story.end("stop_requested", 75)
            states[job] = JobState("COMPLETED")
        elif kind == 3:
            story.end("signalled", 75)
            states[job] = JobState("PENDING", "BeginTime")
        else:
            states[job] = JobState("RUNNING")
    return Listing(states, None)


def failed_gate(root: Path) -> Listing:
    """Beside a run that trains."""
    on = on_slurm(root, "validation-77aa01bc", "31")
    steps(on, 1, 30, ended=2.5)
    beat(on, 4.5)
    story = on_slurm(root, "validation-0f3b2a11", "30")
    steps(story, 1, 60, ended=300.5)
    beat(story, 280.5, 281.5)
    saved(story, 60, 290.5)
    evidence = [
        gate.judge({gate.metric_name: Measurement(1203.4, "the last evaluation, step 60")})
        for gate in GATES[GateLevel.STANDARD]
        if gate.metric_name == "perplexity"
    ]
    GateFile(
        phase=TrainingPhase.SANITY_CHECK, passed=False, identity="", step=60, checkpoint="step-60", weights_digest=None,
        first_loss=9.0, last_loss=7.1, time=NOW, evidence=evidence,
    ).write(story.paths)  # fmt: skip
    story.end("gate", 3)
    return Listing({"30": JobState("COMPLETED"), "31": JobState("RUNNING")}, None)


def hung_node(root: Path) -> Listing:
    """Slurm calls the job RUNNING; one of its nodes has been silent for long, and no step has been done since."""
    story = on_slurm(root, "full-5d21c0de", "77")
    plan = {"nodes": 4, "ranks_per_node": 8, "forecast": {"gpu": "h100", "flops_per_step": 2.6e16}}
    atomic_write_json(story.paths.plan, plan)
    steps(story, 1, 33, ended=752.5, seconds=2.0)
    saved(story, 30, 780.5)
    beat(story, 3.5, 8.5, 745.5, 5.5)
    tell(story, "rank-0", "rolled_back", 800.5, cause="loss_spike", from_step=28, to_step=20)
    return Listing({"77": JobState("RUNNING")}, None)


def slurm_down(root: Path) -> Listing:
    """Its controller does not answer; the runs' own files go on telling."""
    states = {}
    for number, name in enumerate(("full-11112222", "medium-33334444")):
        story = on_slurm(root, name, str(50 + number))
        steps(story, 1, 20 + number, ended=1.5)
        saved(story, 20, 30.5)
        beat(story, 2.5, 3.5)
        states[str(50 + number)] = JobState(UNKNOWN)
    return Listing(states, UNREACHABLE)


SCENES: Mapping[str, Callable[[Path], Listing]] = {
    "empty": empty,
    "one-local-run": one_local_run,
    "fifty-runs": fifty_runs,
    "failed-gate": failed_gate,
    "hung-node": hung_node,
    "slurm-down": slurm_down,
}
