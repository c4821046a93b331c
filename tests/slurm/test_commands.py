"""Verbs on a run's name, on a real Slurm: what squeue, sacct and the run itself say must agree."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import psutil
import pytest

from encdec.files import RunPaths
from encdec.records import read_json_lines
from tests.conftest import wait_for_step, wait_until
from tests.slurm.conftest import Cluster, ledger, outcome, ranks_on_all_nodes

pytestmark = pytest.mark.slurm

LONG = ("--set", "training.num_train_steps=5000", "--set", "training.save_steps=1000")


@pytest.fixture
def paths(cluster: Cluster) -> RunPaths:
    return RunPaths(cluster.lab.root / "runs" / "medium")


def verb(cluster: Cluster, paths: RunPaths, module: str, *flags: str) -> str:
    """A command on the run's name, cut; what it said."""
    code, output = cluster.run(f"launchers.{module}", "med", "--root", str(paths.root.parent), *flags)
    assert code == 0, output
    return output


def status(cluster: Cluster, paths: RunPaths) -> dict:
    return json.loads(verb(cluster, paths, "status", "--json"))["runs"][0]


def test_pending_job_is_cancelled_before_it_ran(cluster: Cluster, paths: RunPaths, eventually: Callable[..., None]):
    blocker = cluster.sandbox.run(
        "sbatch", "--parsable", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 300"
    ).strip()
    try:
        job = cluster.queue(paths)
        said = status(cluster, paths)
        assert (said["state"], said["job"]["id"], said["job"]["state"]) == ("pending", job, "PENDING")
        assert said["job"]["reason"] in ("Resources", "Priority", "None")
        assert "which was waiting, is cancelled" in verb(cluster, paths, "cancel")
        assert cluster.state(job) == "CANCELLED"
        said = status(cluster, paths)
        assert (said["state"], said["attempts"]) == ("cancelled", [])
        eventually(lambda: cluster.history(job) == ["CANCELLED by 0"], 10)
    finally:
        cluster.sandbox.run("scancel", blocker)
    eventually(lambda: cluster.state(blocker) == "CANCELLED", 20)
    assert paths.attempt_numbers() == []


def test_running_job_is_cancelled_with_a_save_and_continued(
    cluster: Cluster, paths: RunPaths, eventually: Callable[..., None]
):
    job = cluster.queue(paths, *LONG, "--continue-by", "successor")
    wait_for_step(paths, 5)
    said = status(cluster, paths)
    assert (said["state"], said["words"]) == ("running", f"job {job} is RUNNING")
    [successor] = [record["job"] for record in ledger(paths.attempt(0).events("node-0"), "successor_queued")]
    lines = verb(cluster, paths, "cancel").splitlines()
    assert [f"job {successor}" in lines[0], f"job {job}" in lines[1]] == [True, True]
    eventually(paths.attempt(0).outcome.is_file, 20)
    assert outcome(paths)["exit_code"] == 75 and outcome(paths)["checkpoint_verified"]
    eventually(lambda: status(cluster, paths)["state"] == "cancelled", 20)
    assert cluster.state(successor) == "CANCELLED" and cluster.state(job) in ("CANCELLED", "FAILED")
    assert "nothing of it is live: cancelled by user" in verb(cluster, paths, "cancel")
    code, output = cluster.run("launchers.requeue", str(paths.root))
    assert code == 78 and "Start it again: cd " in output and "--continue-by successor" in output

    assert paths.announcement(f"{job}.0.0").is_file()
    again = cluster.queue(paths, *LONG)  # the same run goes on
    assert not paths.announcement(f"{job}.0.0").exists()  # another cluster may count its jobs from 1 again
    wait_for_step(paths, outcome(paths)["step"] + 1, attempt=1)
    assert not paths.stop_request.exists()
    verb(cluster, paths, "cancel", "--now")
    eventually(lambda: cluster.state(again) == "CANCELLED", 20)
    assert status(cluster, paths)["state"] == "cancelled"
    assert not paths.attempt(1).outcome.exists()  # nothing was saved, nor said
    assert verb(cluster, paths, "logs", "--lines", "1").count("\n") == 2


def test_cancel_during_the_save_of_a_warned_job_is_final(
    cluster: Cluster, paths: RunPaths, eventually: Callable[..., None]
):
    job = cluster.queue(paths, *LONG)
    wait_for_step(paths, 5)
    ranks = ranks_on_all_nodes(paths)
    for rank in ranks:
        rank.suspend()  # a save that takes its time
    cluster.sandbox.run("scancel", "--signal=USR2", job)
    wait_until(lambda: ledger(paths.attempt(0).events("node-0"), "successor_queued"), "the net is spread")
    verb(cluster, paths, "cancel")
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):  # scancel's own SIGCONT came first
            rank.resume()
    eventually(lambda: cluster.state(job) in ("CANCELLED", "FAILED"), 20)
    eventually(lambda: status(cluster, paths)["state"] == "cancelled", 20)
    [successor] = [record["job"] for record in ledger(paths.attempt(0).events("node-0"), "successor_queued")]
    assert cluster.state(successor) == "CANCELLED"
    assert not ledger(paths.attempt(0).events("node-0"), "requeued")
    assert paths.attempt_numbers() == [0]
    assert outcome(paths)["exit_code"] == 75 and outcome(paths)["checkpoint_verified"]


def test_running_job_is_requeued_and_its_hold_off_lifted(
    cluster: Cluster, paths: RunPaths, eventually: Callable[..., None]
):
    job = cluster.queue(paths, *LONG)
    wait_for_step(paths, 5)
    assert f"job {job} finishes its step and saves" in verb(cluster, paths, "requeue")
    eventually(lambda: cluster.state(job) == "PENDING", 30)
    assert status(cluster, paths)["state"] == "pending"
    words = verb(cluster, paths, "requeue")
    assert f"job {job}, which waited for BeginTime, may start now" in words or "starts by itself" in words
    wait_for_step(paths, outcome(paths)["step"] + 1, attempt=1)
    assert cluster.history(job) == ["REQUEUED", "RUNNING"]
    steps = [[record["step"] for record in read_json_lines(paths.attempt(n).steps)] for n in (0, 1)]
    assert steps[1][0] == steps[0][-1] + 1  # no step twice
    [first, second] = status(cluster, paths)["attempts"]
    assert f"job {job} requeued" in first["followed"] and second["cause"] is None
    verb(cluster, paths, "cancel", "--now")
    eventually(lambda: cluster.state(job) == "CANCELLED", 20)
