"""Secrets on a real Slurm: they reach the job through a requeue, and nothing that anybody else can read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from encdec.files import RunPaths
from launchers.sandbox.cluster import Sandbox
from tests.conftest import wait_for_step
from tests.launchers.secret_lab import CANARIES, command_lines, found_below, found_in, reached_by_others, views
from tests.slurm.conftest import Cluster, Eventually, lift_hold

pytestmark = pytest.mark.slurm


def said_by_slurm(sandbox: Sandbox, job: str) -> list[str]:
    """All that Slurm's commands tell of a job."""
    commands = [
        ("scontrol", "show", "job", "--details", job),
        ("scontrol", "show", "step", job),
        ("scontrol", "write", "batch_script", job, "-"),
        ("sacct", "-D", "-P", "-j", job, "--format=ALL"),
        ("sacct", "-j", job, "--env-vars"),
        ("sacct", "-j", job, "--batch-script"),
        ("squeue", "--all", "-t", "all", "-O", "JobID,Name:200,Comment:400,Command:400,WorkDir:400,StdOut:400"),
    ]
    return [sandbox.run(*command, check=False) for command in commands]


def test_a_whole_run_keeps_secrets(cluster: Cluster, eventually: Eventually, monkeypatch: pytest.MonkeyPatch):
    home = cluster.lab.root / "home"
    for name, value in {**CANARIES, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home))
    monkeypatch.setenv("LAB_NOTIFY", f"json://127.0.0.1:1/{CANARIES['OPENAI_API_KEY']}")  # nobody listens on port 1
    paths = RunPaths(cluster.lab.root / "run")
    extra = [
        "--env-secret", "LAB_PASSPHRASE", "--env-secret", "WANDB_API_KEY", "--set", "infra.notify_env=LAB_NOTIFY",
        "--set", 'training.report_to=["wandb","tensorboard"]',
    ]  # fmt: skip
    before = os.umask(0)
    try:
        with command_lines() as seen:
            planned = cluster.submit(paths, *extra, "--dry-run")
            job = cluster.queue(paths, *extra)
            wait_for_step(paths, 5)
            told = said_by_slurm(cluster.sandbox, job)
            cluster.slurm("scancel", "--signal=USR2", job)  # Slurm's warning: it saves, and is requeued
            eventually(lambda: cluster.state(job) == "PENDING", 60)
            lift_hold(cluster.sandbox, job)
            eventually(lambda: cluster.state(job) == "COMPLETED", 120)
    finally:
        os.umask(before)
    told += said_by_slurm(cluster.sandbox, job)
    pages = [cluster.lab.root / "report.html", cluster.lab.root / "runs.html"]
    shown = [cluster.run(f"launchers.{view}", *more, str(paths.root)) for view, *more in views(*pages)]
    assert not found_below(pages)
    assert len(paths.attempt_numbers()) == 2  # the requeued start had the secrets, too, or it would have refused
    assert any(job in text and "sanity_check" in text for text in told)
    assert any("launchers.job" in line or "submitit" in line for line in seen)
    assert list(paths.root.rglob("*.wandb"))
    for text in (planned[1], *told, *(text for _, text in shown), *seen):
        assert not found_in(text), text
    spool = Path(cluster.sandbox.layout.root)
    logs = [file.parent for file in spool.rglob("*.log")]
    assert logs
    assert not found_below([paths.root, cluster.lab.packed, home, *set(logs)])
    assert not reached_by_others(paths.root)


def test_a_job_that_did_not_get_its_secret_refuses(cluster: Cluster, eventually: Eventually, monkeypatch):
    monkeypatch.setenv("LAB_PASSPHRASE", CANARIES["LAB_PASSPHRASE"])
    paths = RunPaths(cluster.lab.root / "run")
    file = cluster.lab.root / "drops.yaml"
    file.write_text("setup: ['unset LAB_PASSPHRASE']\n")
    where = ["--nodes", "2", "--gpus-per-node", "1", "--run-dir", str(paths.root), "--cluster", str(file)]
    code, output = cluster.lab.run(
        "launchers.submit", "--phase", "sanity_check", *where, *cluster.lab.arguments("--env-secret", "LAB_PASSPHRASE"),
        launcher=cluster.python,
    )  # fmt: skip
    assert code == 0, output
    eventually(lambda: list(paths.submitit.glob("*_0_log.out")), 60)
    log = next(paths.submitit.glob("*_0_log.out"))
    eventually(lambda: "no LAB_PASSPHRASE in its environment" in log.read_text(), 60)
    assert paths.attempt_numbers() == []
