"""Batch scripts on a real Slurm: what the dry run prints, and those that are submitted by hand."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from encdec.files import RunPaths
from encdec.records import read_json_lines
from launchers.sandbox.cluster import Sandbox
from launchers.script import UNKNOWN_SUBMISSION
from tests.conftest import MICRO, PATIENCE_SECONDS, REPOSITORY, Lab, losses, wait_for_step
from tests.slurm.conftest import ledger, lift_hold

pytestmark = pytest.mark.slurm
SCRIPT = "slurm/sanity_check.sbatch"
Eventually = Callable[..., None]


@dataclass
class Hand:
    """Types sbatch for the micro sanity check on two nodes of one rank each, and looks what became of it."""

    lab: Lab
    sandbox: Sandbox
    config: Path
    paths: RunPaths

    def sbatch(self, *extra: str, script: str = str(REPOSITORY / SCRIPT), folder: Path = REPOSITORY) -> str:
        """Returns the job id."""
        size = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10", f"--output={self.log}"]
        which = ["--config", str(self.config), "--run-dir", str(self.paths.root)]
        packed = ["--set", f"data.packed_dir={self.lab.packed}"]
        # two nodes share this machine's cores: threads that spin while they wait would slow each other down
        export = f"--export=ALL,OMP_WAIT_POLICY=PASSIVE,SLURM_CONF={self.sandbox.layout.slurm_conf}"
        place = [f"--chdir={folder}", export]
        return self.sandbox.run("sbatch", "--parsable", *size, *place, script, *which, *packed, *extra).strip()

    @property
    def log(self) -> Path:
        return self.lab.root / "job.out"

    def submit(self, *extra: str) -> tuple[int, str]:
        """launchers.submit for the same run."""
        where = ["--cluster", "slurm", "--nodes", "2", "--gpus-per-node", "1", "--run-dir", str(self.paths.root)]
        settings = (f"SLURM_CONF={self.sandbox.layout.slurm_conf}", sys.executable)
        return self.lab.run(
            "launchers.submit", "--phase", "sanity_check", *where, *self.lab.arguments(*extra),
            launcher=("env", *settings),
        )  # fmt: skip

    def history(self, job: str) -> list[str]:
        """State and exit code of all starts of a job or of one of its steps, oldest first."""
        whole = [] if "." in job else ["-X"]
        return self.sandbox.run("sacct", "-D", *whole, "-n", "-P", "-j", job, "-o", "State,ExitCode").splitlines()

    def steps(self) -> list[list[int]]:
        """Numbers of the steps that each attempt computed."""
        attempts = map(self.paths.attempt, self.paths.attempt_numbers())
        return [[record["step"] for record in read_json_lines(attempt.steps)] for attempt in attempts]

    def outcome(self) -> dict:
        return json.loads(self.paths.attempt(0).outcome.read_text())


@pytest.fixture
def hand(lab: Lab, sandbox: Sandbox) -> Hand:
    config = lab.root / "mine.yaml"
    shutil.copy(MICRO, config)
    return Hand(lab, sandbox, config, RunPaths(lab.root / "my run's"))


def script_of(output: str) -> str:
    """The script in what --dry-run printed."""
    return output[output.index("#!/bin/bash\n") :]


def test_dry_run_prints_what_sbatch_gets(lab: Lab, sandbox: Sandbox, workspace: Path):
    paths = RunPaths(workspace / 'it\'s a "run"')
    flags = ["--phase", "sanity_check", "--cluster", "sandbox", "--nodes", "2", "--run-dir", str(paths.root)]
    launcher = ("env", f"SLURM_CONF={sandbox.layout.slurm_conf}", sys.executable)
    code, output = lab.run("launchers.submit", *flags, *lab.arguments("--dry-run"), launcher=launcher)
    assert code == 0, output
    assert not paths.root.exists()
    script = script_of(output)
    file = workspace / "script.sbatch"
    file.write_text(script)
    sandbox.run("sbatch", "--test-only", str(file))
    code, output = lab.run("launchers.submit", *flags, *lab.arguments(), launcher=launcher)
    assert code == 0, output
    job = output.partition("job ")[2].partition(":")[0]
    sandbox.run("scancel", job)
    comment = sandbox.run("squeue", "-h", "-j", job, "-t", "all", "-o", "%k").strip()
    assert script.replace(UNKNOWN_SUBMISSION, comment.split()[-1]).rstrip() == paths.sbatch.read_text().rstrip()


@pytest.mark.parametrize("script", sorted((REPOSITORY / "slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_slurm_accepts_the_scripts(script: Path, sandbox: Sandbox):
    sandbox.run("sbatch", "--test-only", str(script))


def test_warned_job_goes_on_with_its_own_run_whatever_becomes_of_the_checkout(
    hand: Hand, twin: RunPaths, twin_digest: str, eventually: Eventually
):
    job = hand.sbatch(folder=hand.lab.root)  # typed in a folder that knows nothing of the repository
    wait_for_step(hand.paths, 10)
    assert hand.log.read_text() == f"job {job} runs {hand.paths.root}; its output is in {hand.paths.submitit}\n"
    mine = hand.config.read_text()
    hand.config.write_text("another: configuration")
    hand.sandbox.run("scancel", "--signal=USR2", job)
    eventually(lambda: hand.sandbox.run("squeue", "-h", "-j", job, "-o", "%T") == "PENDING\n", 20)
    lift_hold(hand.sandbox, job)
    code, output = hand.submit("--wait")  # finds the job and follows it
    assert code == 0, output
    assert f"job {job} is this run's already" in output
    assert (hand.outcome()["cause"], hand.outcome()["exit_code"]) == ("signalled", 75)
    last = hand.outcome()["step"]
    assert hand.steps() == [list(range(1, last + 1)), list(range(last + 1, 61))]
    assert losses(hand.paths) == losses(twin)
    assert hand.lab.digest(hand.paths.checkpoints / "step-60") == twin_digest
    eventually(lambda: hand.history(job) == ["REQUEUED|0:0", "COMPLETED|0:0"], 10)
    hand.config.write_text(mine)
    again = hand.sbatch()
    eventually(lambda: hand.history(again) == ["COMPLETED|0:0"], PATIENCE_SECONDS)
    assert "is complete: nothing left to do" in hand.log.read_text()
    assert hand.paths.attempt_numbers() == [0, 1]


def test_successor_gets_a_script_that_stands_alone(
    hand: Hand, twin: RunPaths, twin_digest: str, eventually: Eventually
):
    job = hand.sbatch("--continue-by", "successor")
    wait_for_step(hand.paths, 10)
    successor = json.loads(hand.paths.continuation.read_text())["successor"]
    hand.sandbox.run("scancel", "--signal=USR2", job)
    eventually(lambda: hand.history(successor) == ["COMPLETED|0:0"], PATIENCE_SECONDS)
    assert hand.history(f"{job}.0") == ["FAILED|75:0"]
    what = ("NumNodes=2", "TimeLimit=00:10:00", "CPUs/Task=1", "TresPerNode=gres:gpu:1")
    shown = hand.sandbox.run("scontrol", "show", "job", successor)
    [cancelled] = ledger(hand.paths.attempt(1).events("node-0"), "successor_cancelled")  # a third job is not needed
    assert hand.history(cancelled["job"])[0].startswith("CANCELLED")
    assert [fact for fact in what if fact not in shown] == []
    assert [step for steps in hand.steps() for step in steps] == list(range(1, 61))
    assert hand.lab.digest(hand.paths.checkpoints / "step-60") == twin_digest


def test_scancel_is_final_and_loses_no_step(hand: Hand, eventually: Eventually):
    job = hand.sbatch()
    wait_for_step(hand.paths, 10)
    hand.sandbox.run("scancel", job)
    eventually(hand.paths.attempt(0).outcome.is_file, 10)
    assert hand.outcome()["exit_code"] == 75 and hand.outcome()["checkpoint_verified"]
    eventually(lambda: hand.sandbox.run("squeue", "-h", "-j", job, "-t", "all", "-o", "%T") == "CANCELLED\n", 10)
    assert hand.sandbox.run("squeue", "-h", "-t", "PD", "-o", "%i") == ""


def test_job_of_an_ordinary_user_remembers_its_run(sandbox: Sandbox, workspace: Path, eventually: Eventually):
    remember = 'scontrol update jobid=$SLURM_JOB_ID comment="encdec run /shared/it\'s mine"'
    recall = f"scontrol show job $SLURM_JOB_ID | grep Comment= > {workspace}/recalled"
    sandbox.run("sbatch", "--output=/dev/null", f"--wrap={remember} && {recall}", user="nobody")
    eventually(lambda: (workspace / "recalled").exists() and (workspace / "recalled").read_text(), 20)
    assert (workspace / "recalled").read_text().strip() == "Comment=encdec run /shared/it's mine"
