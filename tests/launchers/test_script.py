"""The batch script is a pure function of what is asked for: golden texts, and what no script may hold.

After a change that is meant: ``python -m tests.launchers.test_script`` writes the golden files anew.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from encdec.errors import ConfigError
from encdec.files import RunPaths
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import resolve_run
from launchers.arguments import parse_submit
from launchers.cluster_file import read_cluster_file
from launchers.script import UNKNOWN_SUBMISSION, JobRequest, job_text, made_inside, require_plain_path, sbatch_text
from launchers.slurm import flags_of
from tests.conftest import MICRO, REPOSITORY, wait_until

GOLDEN = Path(__file__).parent / "golden"
GPUS = str(REPOSITORY / "configs" / "training_config.yaml")
EXAMPLE = str(REPOSITORY / "configs" / "clusters" / "example.yaml")
CASES = {
    "one-node": ("/shared/runs/golden", ["--config", str(MICRO)]),
    "all-flags": (
        "/shared/runs/golden",
        [
            "--config", GPUS, "--nodes", "4", "--time", "1-12:30", "--partition", "gpu", "--account", "lab",
            "--qos", "long", "--constraint", "a100&ib", "--reservation", "spring", "--exclude", "n[1-3],n7",
            "--mem", "500G", "--cpus-per-task", "96",
        ],
    ),
    "hostile-path": ("/shared/my runs/it's \"$HOME\" `id` #1", ["--config", str(MICRO), "--nodes", "2"]),
    "cluster-file": (
        "/shared/runs/golden",
        ["--config", GPUS, "--nodes", "4", "--cluster", EXAMPLE, "--time", "90"],
    ),
}  # fmt: skip
"""Name -> run directory and flags of launchers.submit."""


def request(run_dir: str, flags: list[str]) -> JobRequest:
    arguments = parse_submit(["--phase", "medium", *flags])
    cluster = read_cluster_file(arguments.cluster)
    run = resolve_run(
        TrainingPhase.SANITY_CHECK,
        config_file=arguments.config,
        settings=arguments.set,
        nodes=arguments.nodes,
        ranks_per_node=arguments.gpus_per_node,
        name="golden",
    )
    return JobRequest(
        paths=RunPaths(Path(run_dir)),
        run=run,
        cluster=cluster,
        flags={**cluster.flags, **arguments.sbatch},
        lead_seconds=120,
        submission=UNKNOWN_SUBMISSION,
        python=cluster.python or "/shared/venv/bin/python",
        pythonpath="",
    )


BY_HAND = "by-hand"


def text_of(case: str) -> str:
    """The script, without the digest that changes with every key of the configuration tree."""
    asked = by_hand() if case == BY_HAND else request(*CASES[case])
    text = job_text(asked, made_inside("12")) if case == BY_HAND else sbatch_text(asked)
    return text.replace(asked.run.identity[:16], "<identity>")


def by_hand() -> JobRequest:
    """What a job on two nodes that was submitted by hand asks for its successor."""
    run_dir, flags = CASES["hostile-path"]
    facts = {
        "NumNodes": "2",
        "Partition": "gpu",
        "TimeLimit": "04:00:00",
        "CPUs/Task": "24",
        "TresPerNode": "gres:gpu:8",
    }
    return replace(request(run_dir, flags), flags=flags_of(facts))


@pytest.mark.parametrize("case", [*CASES, BY_HAND])
def test_golden(case: str):
    assert text_of(case) == (GOLDEN / f"{case}.sbatch").read_text()


def test_shell_words_survive_a_hostile_path():
    run_dir, flags = CASES["hostile-path"]
    [srun] = [line for line in sbatch_text(request(run_dir, flags)).splitlines() if line.startswith("srun ")]
    words = shlex.split(srun)
    assert words[words.index("--output") + 1] == f"{run_dir}/submitit/%j_%t_log.out"
    assert words[-1] == f"{run_dir}/submitit"


def test_flags_win_over_the_clusters_file():
    text = text_of("cluster-file")
    assert "#SBATCH --time=90\n" in text and "1-00:00:00" not in text
    assert "#SBATCH --account=my-project\n" in text and "#SBATCH --exclusive\n" in text
    assert text.index("module load") < text.index('export PYTHONPATH=/shared/runs/golden/code"')


@pytest.mark.parametrize("path", ["/shared/50%/run", "/shared/a\\b"])
def test_what_slurm_would_replace_in_a_path_is_refused(path: str):
    with pytest.raises(ConfigError, match=r"without % and .* Choose another with --run-dir"):
        require_plain_path(RunPaths(Path(path)))


def batch(folder: Path, srun: str) -> subprocess.Popen[bytes]:
    """The script of a job by hand, with ``srun`` in place of Slurm's."""
    script, fake = folder / "submit.sbatch", folder / "srun"
    request = replace(by_hand(), paths=RunPaths(folder / "run"))
    request.paths.submitit.mkdir(parents=True, exist_ok=True)
    script.write_text(job_text(request, "12"))
    fake.write_text(f"#!/bin/bash\n{srun}\n")
    fake.chmod(0o755)
    return subprocess.Popen(
        ["bash", str(script)], env={"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "12"}, cwd=folder
    )


def test_batch_shell_ends_as_its_task(tmp_path: Path):
    assert batch(tmp_path, "exit 3").wait(10) == 3
    assert RunPaths(tmp_path / "run").batch_host("12").is_file()  # by which the launcher knows that nodes see it


def test_batch_shell_that_does_not_see_the_run_directory_starts_nothing(tmp_path: Path):
    script = tmp_path / "submit.sbatch"
    script.write_text(job_text(replace(by_hand(), paths=RunPaths(tmp_path / "nowhere")), "12"))
    assert subprocess.run(["bash", str(script)], capture_output=True, check=False).returncode == 78


def test_batch_shell_outlives_every_signal_and_waits_for_the_save(tmp_path: Path):
    shell = batch(tmp_path, "touch began; until [ -e saved ]; do sleep 0.05; done; exit 75")
    wait_until((tmp_path / "began").exists, "srun runs")
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
        shell.send_signal(number)
        time.sleep(0.1)
        assert shell.poll() is None
    (tmp_path / "saved").touch()
    assert shell.wait(10) == 75


@pytest.mark.parametrize("phase", [str(phase) for phase in TrainingPhase])
def test_scripts_by_hand_say_where_they_belong(phase: str):
    done = subprocess.run(
        ["bash", f"slurm/{phase}.sbatch"], env={"PATH": "/usr/bin:/bin"}, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.endswith(f"Type: sbatch slurm/{phase}.sbatch.\n")


if __name__ == "__main__":
    for name in (*CASES, BY_HAND):
        (GOLDEN / f"{name}.sbatch").write_text(text_of(name))
