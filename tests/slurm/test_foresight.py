"""Plans on a real Slurm: its limits are read and refuse before anything is queued; it says when a job would start."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from encdec.files import RunPaths
from launchers.planning.slurm_limits import read_limits
from launchers.sandbox.cluster import Sandbox
from tests.slurm.conftest import Cluster

pytestmark = pytest.mark.slurm
ON_GPUS = ("--set", "infra.device=cuda", "--gpus-per-node", "8")


def test_dry_run_knows_limit_gpus_and_start(cluster: Cluster):
    paths = RunPaths(cluster.lab.root / "planned")
    code, output = cluster.submit(paths, *ON_GPUS, "--set", "training.global_batch_size=16", "--dry-run", "--json")
    assert code == 0, output
    [plan] = json.loads(output)
    forecast = plan["forecast"]
    assert (forecast["gpu"], forecast["device_memory_gb"], forecast["limit_hours"]) == ("h100", 80.0, 1.0)
    assert forecast["attempts"] == 1 and forecast["mfu"] == pytest.approx(0.4)
    assert datetime.fromisoformat(forecast["start_estimate"])
    assert "#SBATCH --gpus-per-node=8\n" in plan["sbatch"]
    assert not paths.root.exists()
    assert cluster.sandbox.run("squeue", "-h", "-n", plan["name"]) == ""


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--time", "2-00"], "partition main allows 24 h"),
        (["--partition", "debug", "--time", "10"], "partition debug allows 5 min"),
        (["--cpus-per-task", "33"], "has 0 of them"),
        (["--mem", "400G"], "400G of memory"),
        ([*ON_GPUS, "--gpus-per-node", "9", "--set", "training.global_batch_size=18"], "9 GPUs"),
        (["--account", "nope"], "Invalid account"),  # what only sbatch --test-only knows
        (["--constraint", "nope"], "Invalid feature"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_queued(cluster: Cluster, flags: list[str], reason: str):
    paths = RunPaths(cluster.lab.root / "refused")
    newest = cluster.sandbox.run("squeue", "-h", "-t", "all", "-o", "%i")
    code, output = cluster.submit(paths, "--name", "refused", *flags)
    assert code == 78
    complaint = output.splitlines()[-1]
    assert complaint.startswith("error: Slurm must accept the job") and reason in complaint
    assert "Nothing is queued" in complaint
    assert not paths.root.exists()
    assert cluster.sandbox.run("squeue", "-h", "-t", "all", "-o", "%i") == newest


def test_limits_of_a_quality_of_service_are_kept(cluster: Cluster, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    def limit(wall: str, nodes: str) -> None:
        sandbox.run(
            "sacctmgr", "-i", "modify", "qos", "urgent", "set", f"MaxWall={wall}", f"MaxTRESPerJob=node={nodes}"
        )

    monkeypatch.setenv("SLURM_CONF", str(sandbox.layout.slurm_conf))
    paths = RunPaths(cluster.lab.root / "urgent")
    limit("00:05:00", "1")
    try:
        [qos] = read_limits({"qos": "urgent"}).qos
        assert (qos.max_seconds, qos.max_resources) == (300, {"node": 1})
        code, output = cluster.submit(paths, "--qos", "urgent", "--time", "10")
        assert code == 78
        assert "QOS urgent allows 5 min" in output and "2 of node, and QOS urgent allows 1" in output
    finally:
        limit("-1", "-1")
    assert read_limits({"qos": "urgent"}).qos[0].max_resources == {}
    assert not Path(paths.root).exists()


def test_nodes_that_are_out_for_now_refuse_nothing(cluster: Cluster, sandbox: Sandbox):
    """sbatch queues such a job; sbatch --test-only alone says that it cannot start."""
    paths = RunPaths(cluster.lab.root / "waits")
    sandbox.run("scontrol", "update", "nodename=n4", "state=drain", "reason=looked-at")
    try:
        code, output = cluster.submit(paths, "--nodes", "4", "--set", "training.global_batch_size=8", "--dry-run")
    finally:
        sandbox.run("scontrol", "update", "nodename=n4", "state=resume")
    assert code == 0, output
    assert "3 of 4 fitting nodes" in output and "the job waits" in " ".join(output.split())
