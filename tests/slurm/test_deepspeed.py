"""``--sharding zero3`` on two nodes of a real Slurm: warned, requeued, finished as an undisturbed run here."""

from __future__ import annotations

import pytest

from encdec.checkpoints.manifest import verify
from encdec.files import RunPaths
from tests.conftest import Lab, wait_for_step
from tests.slurm.conftest import outcome

pytestmark = pytest.mark.slurm

ZERO = ("--sharding", "zero3")


def test_warned_job_goes_on_and_computes_no_step_twice(submit, lab: Lab):
    run = submit(*ZERO)
    wait_for_step(run.paths, 10)
    run.warn()
    here = RunPaths(lab.root / "here")
    code, output = lab.submit(here.root, *ZERO)
    assert code == 0, output
    run.ends_like(here, lab.digest(here.checkpoints / "step-60"))
    assert [outcome(run.paths, attempt)["cause"] for attempt in (0, 1)] == ["signalled", "complete"]
    assert [step for steps in run.steps() for step in steps] == list(range(1, 61))
    manifest = verify(run.paths.checkpoints / "step-60")
    assert (manifest.sharding, manifest.world_size) == ("zero3", 2)
