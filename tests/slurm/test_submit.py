"""Whole runs on a real Slurm cluster: submitted, warned, cancelled, refused. They compute what a local run computes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from encdec.files import RunPaths
from encdec.records import read_json_lines
from tests.conftest import losses, wait_for_step
from tests.slurm.conftest import Cluster, ledger, lift_hold, outcome

pytestmark = pytest.mark.slurm


def test_two_nodes_compute_what_one_machine_computes(
    cluster: Cluster, twin: RunPaths, twin_digest: str, eventually: Callable[..., None]
):
    paths = RunPaths(cluster.lab.root / "run")
    code, output = cluster.submit(paths, "--wait", "--time", "10")
    assert code == 0, output
    assert losses(paths) == losses(twin)
    assert cluster.lab.digest(paths.checkpoints / "step-60") == twin_digest
    [submitted] = ledger(paths.events, "submitted")
    process = json.loads(paths.attempt(0).process.read_text())
    assert process["job"] == submitted["job"] and process["host"] == "n1"
    assert not process["endpoint"].startswith(("127.", "localhost"))
    script = (paths.root / "submit.sbatch").read_text()
    for line in ("--requeue", "--open-mode=append", "--signal=USR2@120", "--time=10", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}\n" in script
    assert "gpus" not in script
    eventually(lambda: cluster.history(submitted["job"]) == ["COMPLETED"], 10)

    code, output = cluster.submit(paths, "--wait")
    assert code == 0 and "nothing left to do" in output
    assert paths.attempt_numbers() == [0] and len(ledger(paths.events, "submitted")) == 1


def test_warned_job_saves_requeues_and_computes_no_step_twice(
    cluster: Cluster, twin: RunPaths, twin_digest: str, eventually: Callable[..., None]
):
    paths = RunPaths(cluster.lab.root / "run")
    job = cluster.queue(paths)
    wait_for_step(paths, 10)
    cluster.sandbox.run("scancel", "--signal=USR2", job)
    eventually(lambda: cluster.sandbox.run("squeue", "-h", "-j", job, "-o", "%T") == "PENDING\n", 20)
    lift_hold(cluster.sandbox, job)
    code, output = cluster.submit(paths, "--wait")  # the same command finds the job and follows it
    assert code == 0, output
    assert f"job {job} is this run's already" in output
    assert len(ledger(paths.events, "submitted")) == 1
    ended = outcome(paths)
    assert (ended["cause"], ended["exit_code"], ended["checkpoint_verified"]) == ("signalled", 75, True)
    assert len(ledger(paths.attempt(0).events("node-0"), "requeued")) == 1
    assert paths.attempt_numbers() == [0, 1]
    steps = [[record["step"] for record in read_json_lines(paths.attempt(n).steps)] for n in (0, 1)]
    assert steps == [list(range(1, ended["step"] + 1)), list(range(ended["step"] + 1, 61))]
    assert losses(paths) == losses(twin)
    assert cluster.lab.digest(paths.checkpoints / "step-60") == twin_digest
    eventually(lambda: cluster.history(job) == ["REQUEUED", "COMPLETED"], 10)


def test_scancel_is_final_and_loses_no_step(cluster: Cluster, eventually: Callable[..., None]):
    paths = RunPaths(cluster.lab.root / "run")
    job = cluster.queue(paths)
    wait_for_step(paths, 10)
    cluster.sandbox.run("scancel", job)
    eventually(paths.attempt(0).outcome.is_file, 10)
    assert outcome(paths)["exit_code"] == 75 and outcome(paths)["checkpoint_verified"]
    eventually(lambda: ledger(paths.attempt(0).events("node-0"), "ended"), 10)
    assert not ledger(paths.attempt(0).events("node-0"), "requeued")
    eventually(lambda: cluster.sandbox.run("squeue", "-h", "-j", job, "-t", "all", "-o", "%T") == "CANCELLED\n", 10)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(["--partition", "nowhere"], "invalid partition"), (["--nodes", "8"], "Node count"), (["--time", "9-00"], "time")],
)
def test_refused_submission_leaves_nothing(cluster: Cluster, flags: list[str], reason: str):
    paths = RunPaths(cluster.lab.root / "refused")
    code, output = cluster.submit(paths, "--name", "refused", *flags)
    assert code == 78
    complaint = output.splitlines()[-1]
    assert complaint.startswith("error: Slurm must accept the job") and reason in complaint
    assert output.count("error: ") == 1
    assert not paths.root.exists()
    assert cluster.sandbox.run("squeue", "-h", "-n", "refused") == ""
