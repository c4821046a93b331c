"""A run with a mirror: its checkpoints are there, too, and come back when the first place is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from encdec.checkpoints.mirror import Mirror
from encdec.errors import ConfigError
from encdec.files import RunPaths
from encdec.records import read_json_lines
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import RunConfig, read_run_config, resolve_run
from tests.conftest import MICRO, Lab, kill_everything, losses, wait_until


def mirrored(paths: RunPaths) -> list[int]:
    """Steps that lie in the run's mirror."""
    run = read_run_config(paths)
    return [
        manifest.step for manifest in Mirror(f"{run.config.infra.checkpoint_mirror}/{run.mirror_folder}").manifests()
    ]


def ledger(paths: RunPaths, attempt: int) -> dict[str, list[str]]:
    """What the ledger of an attempt says of the mirror: kind of entry -> checkpoints."""
    entries: dict[str, list[str]] = {}
    for record in read_json_lines(paths.attempt(attempt).events("mirror")):
        entries.setdefault(record["event"], []).append(record["checkpoint"])
    return entries


def test_lost_checkpoints_come_back_from_the_mirror(lab: Lab, twin: RunPaths, twin_digest: str):
    paths = RunPaths(lab.root / "run")
    setting = ("--set", f"infra.checkpoint_mirror={lab.root / 'second'}")
    process = lab.start_submit(paths.root, *setting)
    wait_until(lambda: "step-15" in ledger(paths, 0).get("mirrored", ()), "the first checkpoint is mirrored")
    kill_everything(paths)
    process.communicate()
    newest = mirrored(paths)[-1]
    shutil.rmtree(paths.checkpoints)
    code, output = lab.submit(paths.root, *setting)
    assert code == 0, output
    assert ledger(paths, 1)["restored"] == [f"step-{newest}"]
    log = (paths.attempt(1).rank_logs(0) / "rank-0.restart-0.err").read_text()
    assert f"restored step-{newest} from the mirror {lab.root / 'second'}" in log
    assert min(r["step"] for r in read_json_lines(paths.attempt(1).steps)) == newest + 1
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest
    assert losses(paths) == losses(twin)
    assert mirrored(paths)[-1] == 60


def resolved(*settings: str) -> RunConfig:
    return resolve_run(TrainingPhase.SANITY_CHECK, config_file=MICRO, settings=settings)


def test_mirror_says_where_a_run_is_not_what_it_computes(tmp_path: Path):
    plain = resolved()
    there = resolved("infra.checkpoint_mirror=second/place")
    assert (there.identity, there.name) == (plain.identity, plain.name)
    assert there.config.infra.checkpoint_mirror == str(Path("second/place").absolute())
    url = resolved("infra.checkpoint_mirror=s3://bucket/runs")
    assert url.config.infra.checkpoint_mirror == "s3://bucket/runs"
    assert plain.config.infra.checkpoint_mirror is None


def test_runs_share_a_mirror_without_meeting_in_it():
    runs = [resolved(), resolved("training.seed=7"), resolve_run(TrainingPhase.VALIDATION, config_file=MICRO)]
    named = [
        resolve_run(TrainingPhase.SANITY_CHECK, config_file=MICRO, settings=s, name="mine")
        for s in ((), ("training.seed=7",))
    ]
    folders = [run.mirror_folder for run in [*runs, *named]]
    assert len(set(folders)) == len(folders)
    assert folders[0] == runs[0].name
    assert folders[3].startswith("mine-")


def test_password_in_the_address_is_refused():
    with pytest.raises(ConfigError, match="no password"):
        resolved("infra.checkpoint_mirror=sftp://me:secret@host/runs")
