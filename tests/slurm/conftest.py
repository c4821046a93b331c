"""A real Slurm cluster for every test that asks for one: the fixtures `sandbox`, `workspace` and `cluster`."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from encdec.errors import MissingPrerequisite
from encdec.files import RunPaths
from encdec.records import read_json_lines
from launchers.sandbox import preflight
from launchers.sandbox.cluster import Sandbox
from launchers.sandbox.layout import Shape
from launchers.slurm import SOON
from tests.conftest import Lab


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm: needs root and Slurm's packages; runs on a real sandbox cluster")


@pytest.fixture(scope="session")
def new_folder() -> Iterator[Callable[[], Path]]:
    """Makes folders that every user may enter and write (pytest's own are closed to other users)."""
    made: list[Path] = []

    def make() -> Path:
        made.append(Path(tempfile.mkdtemp(prefix="sandbox-", dir="/var/tmp")))
        made[-1].chmod(0o777)
        return made[-1]

    yield make
    for folder in made:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def able() -> None:
    """Skips where no sandbox can come up, and says how one could."""
    try:
        preflight.check()
    except MissingPrerequisite as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def sandbox(able: None, new_folder: Callable[[], Path]) -> Iterator[Sandbox]:
    """A cluster of 4 nodes with 8 fake GPUs each. Whoever breaks a node heals it."""
    cluster = Sandbox(new_folder() / "cluster")
    cluster.up(Shape(nodes=4, gpus=8))
    yield cluster
    cluster.down()


@pytest.fixture
def workspace(new_folder: Callable[[], Path]) -> Path:
    """A folder that all nodes and all users can write."""
    return new_folder()


@pytest.fixture
def eventually() -> Callable[..., None]:
    """eventually(condition, seconds): waits until condition() holds, or fails."""

    def wait(condition: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.2)

    return wait


def lift_hold(sandbox: Sandbox, job: str) -> None:
    """Spare a requeued job its hold-off."""
    sandbox.run("scontrol", "update", f"jobid={job}", f"starttime={SOON}")


@dataclass
class Cluster:
    """Submits the micro sanity check on two nodes of one rank each, the world size of the local twin."""

    lab: Lab
    sandbox: Sandbox

    def submit(self, paths: RunPaths, *extra: str) -> tuple[int, str]:
        # two nodes share this machine's cores: threads that spin while they wait would slow each other down
        settings = [f"SLURM_CONF={self.sandbox.layout.slurm_conf}", "OMP_WAIT_POLICY=PASSIVE"]
        where = ["--nodes", "2", "--gpus-per-node", "1", "--run-dir", str(paths.root)]
        return self.lab.run(
            "launchers.submit", "--phase", "sanity_check", "--cluster", "slurm", *where, *self.lab.arguments(*extra),
            launcher=("env", *settings, sys.executable),
        )  # fmt: skip

    def queue(self, paths: RunPaths, *extra: str) -> str:
        """Submit without waiting; returns the job id."""
        code, output = self.submit(paths, *extra)
        assert code == 0, output
        job = json.loads((paths.root / "job.json").read_text())["job"]
        assert f"job {job}: " in output
        return job

    def run(self, module: str, *arguments: str) -> tuple[int, str]:
        """Another command of the launcher, where this cluster's Slurm answers: (exit code, output)."""
        launcher = ("env", f"SLURM_CONF={self.sandbox.layout.slurm_conf}", sys.executable)
        return self.lab.run(module, *arguments, launcher=launcher)

    def state(self, job: str) -> str:
        """What squeue says of a job, ended ones included."""
        return self.sandbox.run("squeue", "-h", "-j", job, "-t", "all", "-o", "%T").strip()

    def history(self, job: str) -> list[str]:
        """The states of all starts of a job, oldest first."""
        return self.sandbox.run("sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "State").splitlines()


@pytest.fixture
def cluster(lab: Lab, sandbox: Sandbox) -> Cluster:
    return Cluster(lab, sandbox)


def outcome(paths: RunPaths, attempt: int = 0) -> dict:
    return json.loads(paths.attempt(attempt).outcome.read_text())


def ledger(path: Path, kind: str) -> list[dict]:
    return [record for record in read_json_lines(path) if record["event"] == kind]
