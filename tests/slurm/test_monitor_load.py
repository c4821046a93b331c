"""What a monitor costs Slurm, counted by its daemons: one squeue in its interval, however many runs there are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.slurm_load import QUESTION, counters
from encdec.files import RunPaths, atomic_write_json
from encdec.records import ContinuationRecord, JobRecord, ProcessRecord
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import resolve_run
from launchers.monitor.__main__ import main
from launchers.monitor.observatory import Observatory
from launchers.names import runs_under
from launchers.sandbox.cluster import Sandbox
from launchers.views.slurm_watch import SlurmWatch
from tests.conftest import MICRO, wait_for_step
from tests.slurm.conftest import Cluster

pytestmark = pytest.mark.slurm

RUNS, JOBS = 100, 10
SECONDS_OF_STEADY_STATE = 10.0


def questions(sandbox: Sandbox) -> Counter[str]:
    """What anybody has asked so far."""
    return Counter({name: count for name, count in counters(sandbox).items() if QUESTION.fullmatch(name)})


@pytest.fixture
def jobs(sandbox: Sandbox) -> Iterator[list[str]]:
    """Jobs that wait."""
    words = ("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true")
    queued = [sandbox.run(*words).strip() for _ in range(JOBS)]
    yield queued
    sandbox.run("scancel", *queued)


@pytest.fixture
def hundred_runs(tmp_path: Path, jobs: list[str]) -> Path:
    """Run directories, ten for each job."""
    run = resolve_run(TrainingPhase.SANITY_CHECK, config_file=MICRO)
    for number in range(RUNS):
        paths, job = RunPaths(tmp_path / "runs" / f"medium-{number}"), jobs[number % JOBS]
        paths.make()
        run.write(paths.run_yaml)
        atomic_write_json(paths.job, JobRecord(submission="ab", job=job, submitted=1000.0).to_json())
        atomic_write_json(paths.continuation, ContinuationRecord(job=job).to_json())
        place = paths.attempt(paths.claim_attempt())
        atomic_write_json(place.process, ProcessRecord(host="n1", pid=1, created=2000.0, job=job).to_json())
        place.heartbeat(0).touch()
    return tmp_path / "runs"


def test_hundred_runs_cost_one_squeue_in_an_interval(
    sandbox: Sandbox, hundred_runs: Path, jobs: list[str], monkeypatch: pytest.MonkeyPatch
):
    before = questions(sandbox)
    sandbox.run("squeue", f"--jobs={','.join(jobs)}", "--states=all")
    one_squeue = questions(sandbox) - before
    assert one_squeue.total()

    monkeypatch.setenv("SLURM_CONF", str(sandbox.layout.slurm_conf))
    observatory = Observatory(lambda: runs_under(hundred_runs), SlurmWatch(interval=1000.0))
    before = questions(sandbox)
    asked = 0
    for _ in range(20):
        observatory.look()
        asked += observatory.ask_slurm()
    assert asked == 1
    assert questions(sandbox) - before == one_squeue
    board = observatory.look()
    assert len(board.sights) == RUNS
    assert {sight.view.job.state for sight in board.sights if sight.view.job} == {"PENDING"}


def test_looking_once_costs_one_squeue(
    sandbox: Sandbox, hundred_runs: Path, jobs: list[str], monkeypatch: pytest.MonkeyPatch, capsys
):
    before = questions(sandbox)
    sandbox.run("squeue", f"--jobs={','.join(jobs)}", "--states=all")
    one_squeue = questions(sandbox) - before
    monkeypatch.setenv("SLURM_CONF", str(sandbox.layout.slurm_conf))
    before = questions(sandbox)
    assert main(["--root", str(hundred_runs), "--once"]) == 0
    assert questions(sandbox) - before == one_squeue
    assert "100 runs: 100 pending; Slurm asked" in capsys.readouterr().out


def test_job_that_trains_asks_nothing(cluster: Cluster, eventually: Callable[..., None]):
    paths = RunPaths(cluster.lab.root / "runs" / "medium")
    job = cluster.queue(paths, "--set", "training.num_train_steps=5000", "--set", "training.save_steps=1000")
    try:
        wait_for_step(paths, 5)
        eventually(lambda: cluster.state(job) == "RUNNING", 20)
        before = questions(cluster.sandbox)
        time.sleep(SECONDS_OF_STEADY_STATE)
        asked = questions(cluster.sandbox) - before
        assert cluster.state(job) == "RUNNING"
        assert asked == Counter()
    finally:
        cluster.sandbox.run("scancel", job)
    eventually(lambda: cluster.state(job) in ("CANCELLED", "FAILED"), 60)
