"""Submissions that go wrong halfway, and places that are awkward."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from encdec.files import RunPaths
from launchers.slurm import parse_time
from launchers.views import watch
from tests.conftest import losses
from tests.slurm.conftest import Cluster, ledger

pytestmark = pytest.mark.slurm

LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


def fake_sbatch(folder: Path, ending: str) -> str:
    """A folder for PATH whose sbatch submits, and then does ``ending`` instead of answering; what only asks is told."""
    folder.mkdir()
    script = folder / "sbatch"
    ask = 'case "$*" in *--test-only*) exec /usr/bin/sbatch "$@";; esac'
    script.write_text(f'#!/bin/sh\n{ask}\n/usr/bin/sbatch "$@" > /dev/null || exit 1\n{ending}\n')
    script.chmod(0o755)
    return str(folder)


def counted_squeue(folder: Path) -> Path:
    """A folder for PATH whose squeue answers, and notes when (seconds since the epoch) it was asked, in ``asked``."""
    folder.mkdir()
    script = folder / "squeue"
    script.write_text(f'#!/bin/sh\ndate +%s >> {folder}/asked\nexec /usr/bin/squeue "$@"\n')
    script.chmod(0o755)
    return folder


def submit_through(cluster: Cluster, folder: str, paths: RunPaths, *extra: str) -> tuple[int, str]:
    """Submit with ``folder`` first on PATH."""
    where = ["--nodes", "2", "--gpus-per-node", "1", "--run-dir", str(paths.root), "--cluster", "slurm"]
    conf = f"SLURM_CONF={cluster.sandbox.layout.slurm_conf}"
    with_path = ("env", conf, "OMP_WAIT_POLICY=PASSIVE", f"PATH={folder}:/usr/bin:/bin", sys.executable)
    return cluster.lab.run(
        "launchers.submit", "--phase", "sanity_check", *where, *cluster.lab.arguments(*extra), launcher=with_path
    )


def test_job_whose_id_was_lost_is_found_not_submitted_again(cluster: Cluster, twin: RunPaths, twin_digest: str):
    paths = RunPaths(cluster.lab.root / 'my run\'s "dir"')  # a path with blanks and quotes
    deaf = fake_sbatch(cluster.lab.root / "bin", f'echo "{LOST}" >&2; exit 1')
    code, output = submit_through(cluster, deaf, paths, "--name", "lost")
    assert code == 0, output
    queued = cluster.sandbox.run("squeue", "-h", "-t", "all", "-n", "lost", "-o", "%i").split()
    assert queued == [json.loads(paths.job.read_text())["job"]]
    code, output = cluster.submit(paths, "--name", "lost", "--wait")
    assert code == 0, output
    assert losses(paths) == losses(twin)
    assert cluster.lab.digest(paths.checkpoints / "step-60") == twin_digest
    assert cluster.sandbox.run("squeue", "-h", "-t", "all", "-n", "lost", "-o", "%i").split() == queued


def test_launcher_that_dies_while_it_submits_leaves_one_job(cluster: Cluster, twin: RunPaths):
    paths = RunPaths(cluster.lab.root / "run")
    deadly = fake_sbatch(cluster.lab.root / "bin", "kill -9 $PPID")
    code, _ = submit_through(cluster, deadly, paths, "--name", "orphan")
    assert code == -9
    assert json.loads(paths.job.read_text())["job"] is None
    code, output = cluster.submit(paths, "--name", "orphan", "--wait")
    assert code == 0, output
    assert "is this run's already" in output
    assert losses(paths) == losses(twin)
    assert len(cluster.sandbox.run("squeue", "-h", "-t", "all", "-n", "orphan", "-o", "%i").split()) == 1


def test_directory_that_the_nodes_do_not_see(cluster: Cluster, workspace: Path, eventually: Callable[..., None]):
    for node in ("n1", "n2", "n3", "n4"):
        hide = cluster.sandbox.inside(node, ["mount", "-t", "tmpfs", "none", str(workspace)])
        subprocess.run(hide, check=True)
    paths = RunPaths(workspace / "run")
    code, output = cluster.submit(paths, "--wait")
    assert code == 78, output
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "must be visible on the nodes" in line and "--run-dir" in line
    [submitted] = ledger(paths.events, "submitted")
    eventually(lambda: cluster.sandbox.run("squeue", "-h", "-j", submitted["job"], check=False) == "", 20)


def test_job_that_dies_at_once_is_noticed_before_slurm_would_be_asked_again(cluster: Cluster, workspace: Path):
    """The Python of the cluster's file is on no node."""
    (workspace / "mine.yaml").write_text("python: /nowhere/python\nenvironment: {OMP_WAIT_POLICY: PASSIVE}\n")
    paths, squeue = RunPaths(workspace / "run"), counted_squeue(workspace / "bin")
    code, output = submit_through(cluster, str(squeue), paths, "--cluster", str(workspace / "mine.yaml"), "--wait")
    noticed = time.time()
    assert code == 1, output
    [submitted] = ledger(paths.events, "submitted")
    assert f"job {submitted['job']}, which ended FAILED" in output
    ended = parse_time(cluster.sandbox.run("sacct", "-X", "-n", "-P", "-j", submitted["job"], "-o", "End").strip())
    assert noticed - ended < watch.SECONDS_BETWEEN_SQUEUES
    assert len((squeue / "asked").read_text().split()) <= 2 + 2 * len(watch.PAUSES_AT_FIRST)
