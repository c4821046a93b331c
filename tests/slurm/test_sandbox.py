"""The sandbox is a real cluster: jobs run, impossible ones are refused, nothing stays. (Accidents: test_accidents.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from encdec.errors import ConfigError, EncdecError, MissingPrerequisite
from launchers.sandbox import preflight, render
from launchers.sandbox.__main__ import main
from launchers.sandbox.cluster import Sandbox
from launchers.sandbox.layout import Blueprint, Layout, Shape

slurm = pytest.mark.slurm


def submit(sandbox: Sandbox, *argv: str, user: str | None = None) -> str:
    return sandbox.run("sbatch", "--parsable", "--output=/dev/null", *argv, user=user).strip()


def history(sandbox: Sandbox, job: str) -> list[str]:
    """The states of all attempts of a job, oldest first."""
    return sandbox.run("sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "State").split()


def traces(folder: Path) -> str:
    """Processes, links and files that carry the sandbox's name."""
    layout = Layout(folder)
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    found = subprocess.run(
        ["pgrep", "-f", "-a", f"{folder}(/| |$)"], capture_output=True, text=True, check=False
    ).stdout
    return found + (links if layout.host_link in links else "") + (str(folder) if folder.exists() else "")


# --- a cluster


@slurm
def test_one_step_runs_on_all_nodes(sandbox: Sandbox) -> None:
    assert sorted(sandbox.run("srun", "--nodes=4", "hostname").split()) == ["n1", "n2", "n3", "n4"]


@slurm
def test_batch_job_of_an_ordinary_user_is_accounted(sandbox: Sandbox, eventually: Callable[..., None]) -> None:
    job = submit(sandbox, "--qos=urgent", "--nodes=2", "--wrap=srun hostname", user="nobody")
    fields = ["sacct", "-X", "-n", "-P", "-j", job, "-o", "State,User,Account,QOS"]
    eventually(lambda: sandbox.run(*fields).strip() == "COMPLETED|nobody|research|urgent", 10)


@slurm
def test_steps_find_the_cluster_without_the_submitters_environment(
    sandbox: Sandbox, workspace: Path, eventually: Callable[..., None]
) -> None:
    script = f"srun --export=ALL --ntasks=2 hostname > {workspace}/hosts"
    job = submit(sandbox, "--export=NONE", "--nodes=2", f"--wrap={script}")
    eventually(lambda: history(sandbox, job) == ["COMPLETED"], 20)
    assert sorted((workspace / "hosts").read_text().split()) == ["n1", "n2"]


@slurm
def test_jobs_see_the_gpus_they_asked_for(sandbox: Sandbox) -> None:
    show = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    assert sandbox.run("srun", "--gres=gpu:3", *show).strip() == "0,1,2"
    assert sandbox.run("srun", "--nodes=2", "--gpus-per-node=8", *show).split() == ["0,1,2,3,4,5,6,7"] * 2
    with pytest.raises(EncdecError, match=r"[Rr]equested node configuration is not available"):
        sandbox.run("srun", "--gres=gpu:9", *show)


@slurm
def test_nodes_run_this_python_and_reach_each_other_by_name(sandbox: Sandbox) -> None:
    server = "import socket; s=socket.create_server(('n1', 29500)); s.accept()[0].sendall(b'hello')"
    client = "import socket,time; time.sleep(1); print(socket.create_connection(('n1', 29500)).recv(9).decode())"
    with subprocess.Popen(sandbox.inside("n1", [sys.executable, "-c", server])):
        ask = sandbox.inside("n2", [sys.executable, "-c", client])
        assert subprocess.run(ask, check=True, capture_output=True, text=True).stdout == "hello\n"


@slurm
@pytest.mark.parametrize(
    "wrong", [["--partition=debug", "--time=6"], ["--qos=nonsense"], ["--account=nonsense"], ["--nodes=5"]]
)
def test_impossible_jobs_are_refused_at_submission(sandbox: Sandbox, wrong: list[str]) -> None:
    with pytest.raises(EncdecError, match="Batch job submission failed"):
        submit(sandbox, *wrong, "--wrap=true")


# --- coming and going


@slurm
def test_up_twice_is_kind_and_down_leaves_nothing_but_what_is_not_ours(
    able: None, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--dir", str(workspace / "second")]
    assert main(["up", "--nodes", "1", "--gpus", "0", *where]) == 0
    assert main(["up", "--nodes", "1", "--gpus", "0", *where]) == 0
    assert "Already up: 1 node with 0 GPUs each" in capsys.readouterr().out
    assert main(["up", "--nodes", "2", *where]) == 78
    assert main(["env", *where]) == 0
    assert capsys.readouterr().out == f"export SLURM_CONF={workspace}/second/etc/slurm.conf\n"
    command = [sys.executable, "-m", "launchers.sandbox", "exec", *where, "n1", "--", "sh", "-c", "hostname; exit 7"]
    inside = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (inside.stdout, inside.returncode) == ("n1\n", 7)
    with subprocess.Popen(["sleep", "60"]) as stranger:  # has a number that one of ours might have had before
        forged = f'{{"pid": {stranger.pid}, "started": 1, "boot": "another"}}'
        (workspace / "second/run/n9.json").write_text(forged)
        (workspace / "second/results.txt").write_text("mine")
        assert main(["down", *where]) == 0
        assert stranger.poll() is None
        stranger.kill()
    assert [path.name for path in (workspace / "second").iterdir()] == ["results.txt"]
    shutil.rmtree(workspace / "second")
    assert traces(workspace / "second") == ""
    assert main(["down", *where]) == 0


@slurm
def test_sandboxes_that_come_up_at_once_are_two(able: None, workspace: Path) -> None:
    places = [workspace / name for name in ("one", "other")]
    command = [sys.executable, "-m", "launchers.sandbox"]
    ups = [subprocess.Popen([*command, "up", "--nodes", "1", "--gpus", "0", "--dir", str(place)]) for place in places]
    try:
        assert [up.wait() for up in ups] == [0, 0]
        assert len({Layout(place).blueprint().subnet for place in places}) == 2
        for place in places:
            assert Sandbox(place).run("srun", "hostname").strip() == "n1"
    finally:
        for place in places:
            assert main(["down", "--dir", str(place)]) == 0


@slurm
def test_failed_up_shows_the_log_and_leaves_nothing(
    able: None, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace / "templates").mkdir()
    for template in render.TEMPLATES.glob("*.*"):
        text = template.read_text().replace("SchedulerType=sched/backfill", "SchedulerType=sched/nonsense")
        (workspace / "templates" / template.name).write_text(text)
    monkeypatch.setattr(render, "TEMPLATES", workspace / "templates")
    with pytest.raises(EncdecError, match="slurmctld ended with status 1") as failure:
        Sandbox(workspace / "broken").up(Shape(nodes=1))
    assert "sched/nonsense" in failure.value.__notes__[0]
    assert traces(workspace / "broken") == ""


@slurm
def test_up_clears_an_interrupted_up_and_nothing_outlives_its_directory(
    able: None, workspace: Path, capsys: pytest.CaptureFixture[str], eventually: Callable[..., None]
) -> None:
    argv = [sys.executable, "-m", "launchers.sandbox", "up", "--nodes", "1", "--dir", str(workspace / "half")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as interrupted:
        interrupted.stdout.readline()
        interrupted.kill()
    assert main(argv[3:]) == 0
    assert "Clearing away" in capsys.readouterr().out
    shutil.rmtree(workspace / "half")  # instead of `down`
    eventually(lambda: traces(workspace / "half") == "", 10)


# --- refusals: these need neither root nor Slurm


@pytest.mark.parametrize("argv", [["up", "--nodes", "0"], ["up", "--nodes", "65"], ["up", "--gpus", "17"]])
def test_impossible_shapes_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 78
    assert argv[-1] in capsys.readouterr().err


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SYSTEM_PATH", "/nowhere")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(
        MissingPrerequisite, match=r"apt-get install .* slurmctld slurmd slurmdbd slurm-client munge mariadb"
    ):
        preflight.check()


def test_other_users_are_told_to_use_sudo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MissingPrerequisite, match=r"found uid 1000\. Run: sudo "):
        Sandbox("/var/tmp/none").up(Shape())


@pytest.mark.parametrize("root", ["/var/tmp/a b", "/var/tmp/a,b", "/var/tmp/" + "x" * 60])
def test_paths_that_slurm_or_sockets_cannot_take_are_refused(root: str) -> None:
    with pytest.raises(ConfigError, match="at most 64 characters"):
        Sandbox(root)


def test_commands_without_a_sandbox_say_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--dir", "/var/tmp/none"]) == 78
    assert "python -m launchers.sandbox up" in capsys.readouterr().err


def test_configuration_has_no_gpus_where_none_are_wanted() -> None:
    layout, blueprint = Layout(Path("/sandbox")), Blueprint(shape=Shape(nodes=2, gpus=0), subnet="10.77.5")
    files = render.configuration(layout, blueprint, users=["nobody"], slurm_version=(24, 11))
    assert "gpu:h100" not in files[layout.slurm_conf]
    assert "NodeName=n2 NodeAddr=10.77.5.12" in files[layout.slurm_conf]
    assert "File=" not in files[layout.etc / "gres.conf"]
    assert "CgroupPlugin=disabled" in files[layout.etc / "cgroup.conf"]
