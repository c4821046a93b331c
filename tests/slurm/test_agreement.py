"""A phase on four nodes of two ranks each: squeue, sacct and our status agree all along."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import pytest

from encdec.files import RunPaths
from encdec.records import JobRecord, read_record
from launchers.sandbox.cluster import Sandbox
from launchers.views import overview, tables
from tests.conftest import Lab
from tests.slurm.conftest import Cluster, outcome

pytestmark = pytest.mark.slurm

SECONDS_BETWEEN_LOOKS = 1.0
STATE_OF = {"PENDING": "pending", "CONFIGURING": "running", "RUNNING": "running", "COMPLETING": "running"}
"""What squeue says of a job that lives -> what the run's status must be."""
ACCOUNTED = {"CONFIGURING": "RUNNING", "COMPLETING": "COMPLETED"}
"""squeue's word -> sacct's, where it has another: accounting knows no in-between, an end counts from its beginning."""
LOOKS_LATE = 5
"""slurmctld tells slurmdbd of a change when it has time: sacct may still say what squeue said some looks ago."""


@dataclass(frozen=True)
class Look:
    """What the three said within one look; squeue twice, before and after the others."""

    squeue: tuple[str, str]
    """Empty: the job is not listed."""
    sacct: str
    status: dict[str, Any]
    """A run of ``launchers.status --json``."""
    finished: tuple[bool, bool]
    """Whether the run had written that it is complete, before its status was looked at and after."""


def look(cluster: Cluster, paths: RunPaths, job: str) -> Look:
    before, finished = cluster.state(job), is_finished(paths)
    [view] = overview.look([paths], forgiving=False)
    accounted = cluster.history(job)
    assert len(accounted) <= 1  # it was never started again
    states, ends = (before, cluster.state(job)), (finished, is_finished(paths))
    return Look(states, "".join(accounted), tables.document(view), ends)


def is_finished(paths: RunPaths) -> bool:
    return paths.attempt(0).outcome.is_file() and outcome(paths)["cause"] == "complete"


def contradictions(looks: list[Look]) -> list[str]:
    """What does not fit together, in words. Tolerated is, and nothing else:

    - a change of state between squeue's two answers: our status may say either;
    - that a run is complete before its job has ended: the outcome is written first, and its tasks leave then;
    - that sacct is late (LOOKS_LATE).
    """
    wrong, told = [], ["", "PENDING"]  # before the first look
    for number, seen in enumerate(looks):
        told += [ACCOUNTED.get(state, state) for state in seen.squeue]
        if seen.sacct not in told[-2 * (LOOKS_LATE + 1) :]:
            wrong.append(f"look {number}: squeue {seen.squeue}, but sacct {seen.sacct}")
        if not agrees(seen):
            wrong.append(
                f"look {number}: squeue {seen.squeue}, but status {seen.status['state']}, {seen.status['job']}"
            )
    return wrong


def agrees(seen: Look) -> bool:
    """Whether our status fits to what squeue said before or after it."""
    state, job = seen.status["state"], seen.status["job"]
    if state == "complete":
        return job is None and seen.finished[1]
    living = [said for said in seen.squeue if said in STATE_OF]
    return not seen.finished[0] and any((state, job and job["state"]) == (STATE_OF[said], said) for said in living)


RUNS, WAITS, ENDED = ("RUNNING", "RUNNING"), ("PENDING", "PENDING"), ("COMPLETED", "COMPLETED")


def said(state: str, job: str | None) -> dict[str, Any]:
    return {"state": state, "job": job and {"state": job}, "words": f"{state}: {job}"}


@pytest.mark.parametrize(
    ("squeue", "sacct", "status", "finished"),
    [
        (RUNS, "RUNNING", said("pending", "PENDING"), False),
        (RUNS, "RUNNING", said("running", "PENDING"), False),
        (RUNS, "RUNNING", said("complete", None), False),
        (RUNS, "RUNNING", said("lost", "RUNNING"), False),
        (WAITS, "PENDING", said("running", "RUNNING"), False),
        (ENDED, "COMPLETED", said("running", "COMPLETED"), True),
        (RUNS, "COMPLETED", said("running", "RUNNING"), False),
    ],
)
def test_what_does_not_fit_is_found(squeue: tuple[str, str], sacct: str, status: dict[str, Any], finished: bool):
    fits = Look(RUNS, "RUNNING", said("running", "RUNNING"), (False, False))
    assert contradictions([fits, fits]) == []
    assert len(contradictions([fits, Look(squeue, sacct, status, (finished, finished))])) == 1


def test_four_nodes_of_two_ranks(lab: Lab, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    cluster, paths, looks = Cluster(lab, sandbox), RunPaths(lab.root / "run"), []
    monkeypatch.setenv("SLURM_CONF", str(sandbox.layout.slurm_conf))
    fewer = ("--set", "training.num_train_steps=20", "--set", "training.eval_steps=20")
    command = lab.start(
        "launchers.submit", "--phase", "sanity_check", "--nodes", "4", "--config", "configs/tiny.yaml", "--wait",
        "--run-dir", str(paths.root), "--set", f"data.packed_dir={lab.packed}", *fewer, launcher=cluster.python,
    )  # fmt: skip
    while command.poll() is None:
        job = read_record(paths.job, JobRecord).job if paths.job.is_file() else None
        if job is not None:
            looks.append(look(cluster, paths, job))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    output, _ = command.communicate()
    assert command.returncode == 0, output
    assert contradictions(looks) == []
    assert any(seen.squeue == ("RUNNING", "RUNNING") and seen.sacct == "RUNNING" for seen in looks)
    assert outcome(paths)["step"] == 20
    assert len(list(paths.attempt(0).root.glob("logs/node-[0-3]/rank-[0-7].restart-0.err"))) == 8
    assert "FSDP2 over 8 ranks" in (paths.attempt(0).rank_logs(0) / "rank-0.restart-0.err").read_text()
    job = json.loads(paths.job.read_text())["job"]
    wait = time.monotonic() + 20
    while cluster.history(job) != ["COMPLETED"]:
        assert time.monotonic() < wait
        time.sleep(0.2)
    assert contradictions([look(cluster, paths, job)]) == []
