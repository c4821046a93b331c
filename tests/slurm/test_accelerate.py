"""``--launcher accelerate`` on two nodes of a real Slurm cluster: what torch elastic computes, although warned."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from encdec.files import RunPaths
from encdec.records import read_json_lines
from tests.conftest import losses, wait_for_step
from tests.slurm.conftest import Cluster, ledger, lift_hold, outcome

pytestmark = pytest.mark.slurm

ACCELERATE = ("--launcher", "accelerate")


def test_warned_job_requeues_under_accelerate_and_computes_no_step_twice(
    cluster: Cluster, twin: RunPaths, twin_digest: str, eventually: Callable[..., None]
):
    """USR2 reaches every process of the step here, ranks that have nothing to say to it among them."""
    paths = RunPaths(cluster.lab.root / "run")
    job = cluster.queue(paths, *ACCELERATE)
    wait_for_step(paths, 10)
    cluster.sandbox.run("scancel", "--signal=USR2", job)
    eventually(lambda: cluster.sandbox.run("squeue", "-h", "-j", job, "-o", "%T") == "PENDING\n", 20)
    lift_hold(cluster.sandbox, job)
    code, output = cluster.submit(paths, "--wait")  # follows the job, which goes on as it was submitted
    assert code == 0, output
    ended = outcome(paths)
    assert (ended["cause"], ended["exit_code"], ended["restarts"]) == ("signalled", 75, 0)
    assert paths.attempt_numbers() == [0, 1]
    steps = [[record["step"] for record in read_json_lines(paths.attempt(n).steps)] for n in (0, 1)]
    assert steps == [list(range(1, ended["step"] + 1)), list(range(ended["step"] + 1, 61))]
    for attempt, node in itertools.product((0, 1), ("node-0", "node-1")):
        [ready] = ledger(paths.attempt(attempt).events(node), "agent_ready")
        assert ready["launcher"] == "accelerate"
    assert losses(paths) == losses(twin)
    assert cluster.lab.digest(paths.checkpoints / "step-60") == twin_digest
