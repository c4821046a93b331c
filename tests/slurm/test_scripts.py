"""Batch scripts on a real Slurm: what the dry run prints, and those that are submitted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from encdec.files import RunPaths
from launchers.sandbox.cluster import Sandbox
from launchers.script import UNKNOWN_SUBMISSION
from tests.conftest import Lab

pytestmark = pytest.mark.slurm


def script_of(output: str) -> str:
    """The script in what --dry-run printed."""
    return output[output.index("#!/bin/bash\n") :]


def test_dry_run_prints_what_sbatch_gets(lab: Lab, sandbox: Sandbox, workspace: Path):
    paths = RunPaths(workspace / 'it\'s a "run"')
    flags = ["--phase", "sanity_check", "--cluster", "sandbox", "--nodes", "2", "--run-dir", str(paths.root)]
    settings = (f"SLURM_CONF={sandbox.layout.slurm_conf}", sys.executable)
    code, output = lab.run("launchers.submit", *flags, *lab.arguments("--dry-run"), launcher=("env", *settings))
    assert code == 0, output
    assert not paths.root.exists()
    script = script_of(output)
    file = workspace / "script.sbatch"
    file.write_text(script)
    sandbox.run("sbatch", "--test-only", str(file))
    code, output = lab.run("launchers.submit", *flags, *lab.arguments(), launcher=("env", *settings))
    assert code == 0, output
    job = output.partition("job ")[2].partition(":")[0]
    sandbox.run("scancel", job)
    comment = sandbox.run("squeue", "-h", "-j", job, "-t", "all", "-o", "%k").strip()
    assert script.replace(UNKNOWN_SUBMISSION, comment.split()[-1]).rstrip() == paths.sbatch.read_text().rstrip()
