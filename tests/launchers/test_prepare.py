"""What slurm/*.sbatch run first, without Slurm: scripts play its commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from encdec.files import RunPaths
from launchers.prepare import main
from tests.conftest import MICRO
from tests.launchers.conftest import Play

JOB = "JobId=12 NumNodes=2 Partition=gpu TimeLimit=00:30:00 CPUs/Task=4\n"


def prepare(paths: RunPaths, monkeypatch: pytest.MonkeyPatch, *more: str, job: str = "12") -> int:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    place = ["--config", str(MICRO), "--nodes", "2", "--gpus-per-node", "1", "--run-dir", str(paths.root)]
    return main(["--phase", "sanity_check", *place, *more])


def test_new_run_is_made_and_belongs_to_the_job(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    play("scontrol", JOB)
    paths = RunPaths(tmp_path / "my run")
    assert prepare(paths, monkeypatch) == 0
    assert capsys.readouterr().out == f"{paths.root}\n"
    assert json.loads(paths.job.read_text())["job"] == "12"
    assert json.loads(paths.launch.read_text())["lead_seconds"] == 120
    script = paths.sbatch.read_text()
    for flag in ("nodes=2", "partition=gpu", "time=00:30:00", "cpus-per-task=4", "signal=USR2@120", "requeue"):
        assert f"#SBATCH --{flag}\n" in script
    assert play.calls("scontrol")[-1] == f"update jobid=12 comment=encdec run {paths.root}"


def test_accounting_that_shows_environments_is_warned_of(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    play("scontrol", f"{JOB}AccountingStoreFlags = job_env\n")
    monkeypatch.setenv("LAB_TOKEN", "a-value-that-is-secret")
    paths = RunPaths(tmp_path / "run")
    assert prepare(paths, monkeypatch, "--env-secret", "LAB_TOKEN") == 0
    said = capsys.readouterr()
    assert "sacct --env-vars shows LAB_TOKEN" in said.err and "a-value-that-is-secret" not in said.err
    assert said.out == f"{paths.root}\n"  # the script that called reads it


def test_job_that_finds_another_one_at_the_run_is_refused_and_changes_nothing(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    play("scontrol", JOB)
    paths = RunPaths(tmp_path / "run")
    assert prepare(paths, monkeypatch) == 0
    play("squeue", "PENDING\n")
    assert prepare(paths, monkeypatch, job="13") == 78
    captured = capsys.readouterr()
    assert "One job at a time runs a run" in captured.err and "job 12" in captured.err
    assert json.loads(paths.job.read_text())["job"] == "12" and "inside job 12" in paths.sbatch.read_text()
    play("squeue", "TIMEOUT\n")
    assert prepare(paths, monkeypatch, job="13") == 0
    assert json.loads(paths.job.read_text())["job"] == "13"


def test_outside_a_job_it_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["--phase", "full"]) == 78
    assert "sbatch slurm/full.sbatch" in capsys.readouterr().err
