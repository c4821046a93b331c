"""Whole runs on a real Slurm cluster: submitted, warned, cancelled, refused. They compute what a local run computes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from encdec.files import RunPaths
from tests.conftest import losses
from tests.slurm.conftest import Cluster, ledger

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
