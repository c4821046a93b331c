"""``--sharding zero3`` on two nodes of a real Slurm: warned, requeued, finished."""

from __future__ import annotations

import json

import pytest

from encdec.checkpoints.manifest import verify
from encdec.files import RunPaths
from tests.conftest import losses, wait_for_step
from tests.slurm.conftest import outcome

pytestmark = pytest.mark.slurm


def test_warned_job_goes_on_and_computes_no_step_twice(submit, twin: RunPaths):
    run = submit("--sharding", "zero3")
    wait_for_step(run.paths, 10)
    run.warn()
    run.lift_hold()
    code, output = run.cluster.submit(run.paths, "--wait", "--sharding", "zero3")
    assert code == 0, output
    assert [outcome(run.paths, attempt)["cause"] for attempt in (0, 1)] == ["signalled", "complete"]
    assert [step for steps in run.steps() for step in steps] == list(range(1, 61))
    manifest = verify(run.paths.checkpoints / "step-60")
    assert (manifest.sharding, manifest.world_size) == ("zero3", 2)
    found, fsdp2 = losses(run.paths), losses(twin)
    assert max(abs(found[step] - fsdp2[step]) for step in fsdp2) < 1e-3
    assert json.loads((run.paths.gates / "sanity_check.json").read_text())["passed"]
