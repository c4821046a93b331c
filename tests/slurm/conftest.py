"""A real Slurm cluster for every test that asks for one: the fixtures `sandbox`, `workspace`, `cluster`, `submit`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from encdec.errors import MissingPrerequisite
from encdec.files import RunPaths
from encdec.records import ContinuationRecord, read_json_lines, read_record
from launchers.sandbox import preflight
from launchers.sandbox.cluster import Sandbox
from launchers.sandbox.layout import Shape
from launchers.slurm import SOON
from tests.conftest import Lab, losses

Eventually = Callable[..., None]


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
    user: str | None = None
    """Who asks Slurm; None: root."""
    become: tuple[str, ...] = ()
    """Words before a command that make its process the user's."""

    @property
    def python(self) -> tuple[str, ...]:
        """Words before ``-m module``, where this cluster's Slurm answers."""
        # two nodes share this machine's cores: threads that spin while they wait would slow each other down
        settings = (f"SLURM_CONF={self.sandbox.layout.slurm_conf}", "OMP_WAIT_POLICY=PASSIVE")
        return (*self.become, "env", *settings, sys.executable)

    def submit(self, paths: RunPaths, *extra: str) -> tuple[int, str]:
        where = ["--nodes", "2", "--gpus-per-node", "1", "--run-dir", str(paths.root)]
        return self.lab.run(
            "launchers.submit", "--phase", "sanity_check", "--cluster", "slurm", *where, *self.lab.arguments(*extra),
            launcher=self.python,
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
        return self.lab.run(module, *arguments, launcher=self.python)

    def slurm(self, *command: str) -> str:
        """One of Slurm's own commands: what it printed."""
        return self.sandbox.run(*command, user=self.user)

    def state(self, job: str) -> str:
        """What squeue says of a job, ended ones included."""
        return self.sandbox.run("squeue", "-h", "-j", job, "-t", "all", "-o", "%T").strip()

    def history(self, job: str) -> list[str]:
        """The states of all starts of a job, oldest first."""
        return self.sandbox.run("sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "State").splitlines()


@pytest.fixture
def cluster(lab: Lab, sandbox: Sandbox) -> Cluster:
    return Cluster(lab, sandbox)


class Run:
    """One run on the cluster, and what is done to it.

    Args:
        cluster: where.
        extra: flags of its submission.
    """

    def __init__(self, cluster: Cluster, eventually: Eventually, *extra: str) -> None:
        self.cluster, self.eventually, self.extra = cluster, eventually, extra
        self.paths = RunPaths(cluster.lab.root / "run")
        self.slurm, self.state = cluster.slurm, cluster.state
        self.job = cluster.queue(self.paths, *extra)

    def warn(self) -> None:
        """What Slurm sends before the time limit."""
        self.slurm("scancel", "--signal=USR2", self.job)

    def set_end(self, *, seconds: float) -> None:
        """The job's time will be up so many seconds from now."""
        end = datetime.now() + timedelta(seconds=seconds)
        self.slurm("scontrol", "update", f"jobid={self.job}", f"endtime={end.isoformat(timespec='seconds')}")

    def preempt(self) -> None:
        """Have a job of higher priority take all nodes, for a moment. Until it is warned the run stands still: it would
        be over before Slurm looks.
        """
        whole = ["--nodes=4", "--exclusive", "--partition=high", "--time=5", "--output=/dev/null", "--wrap=sleep 600"]
        queued = len(self.events("successor_queued"))  # one in advance
        with standing_still(self.paths):
            high = self.slurm("sbatch", "--parsable", *whole).strip()
            self.eventually(
                lambda: len(self.events("successor_queued")) > queued or self.state(self.job) != "RUNNING", 60
            )
        self.eventually(lambda: self.state(high) == "RUNNING", 60)
        self.slurm("scancel", high)

    def nodes(self) -> list[str]:
        """Names of the nodes that the job runs on."""
        return self.slurm(
            "scontrol", "show", "hostnames", self.slurm("squeue", "-h", "-j", self.job, "-o", "%N").strip()
        ).split()

    def processes_on(self, node: str) -> list[psutil.Process]:
        """Processes of a node that name the run in their command lines: its agent, its batch shell."""
        space = pid_space(self.cluster.sandbox, node)
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(OSError, psutil.Error):
                words = " ".join(process.info["cmdline"] or ())
                if str(self.paths.root) in words and os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                    found.append(process)
        assert found
        return found

    def lift_hold(self) -> None:
        """Slurm holds a requeued job back for a while."""
        self.eventually(lambda: self.state(self.job) == "PENDING", 60)
        lift_hold(self.cluster.sandbox, self.job)

    def events(self, kind: str, attempt: int = 0) -> list[dict]:
        return ledger(self.paths.attempt(attempt).events("node-0"), kind)

    def successor(self) -> str | None:
        return read_record(self.paths.continuation, ContinuationRecord).successor

    def ends_like(self, twin: RunPaths, digest: str) -> str:
        """Follow it to its end; returns what the command printed."""
        code, output = self.cluster.submit(self.paths, "--wait", *self.extra)
        assert code == 0, output
        assert losses(self.paths) == losses(twin)
        assert self.cluster.lab.digest(self.paths.checkpoints / "step-60") == digest
        return output

    def steps(self) -> list[list[int]]:
        """Steps computed by each attempt."""
        numbers = self.paths.attempt_numbers()
        return [[record["step"] for record in read_json_lines(self.paths.attempt(n).steps)] for n in numbers]


@pytest.fixture
def submit(cluster: Cluster, eventually: Eventually) -> Callable[..., Run]:
    """submit(*flags): a run of the cluster, queued."""
    return lambda *extra: Run(cluster, eventually, *extra)


@contextlib.contextmanager
def again_and_again(act: Callable[[], None], seconds: float, *, urgent: bool = False) -> Iterator[None]:
    """Act every so many seconds, in a thread, until the block ends; ``urgent``: before all other processes."""
    done = threading.Event()

    def repeat() -> None:
        if urgent:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        while not done.wait(seconds):
            act()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def standing_still(paths: RunPaths) -> Iterator[None]:
    """Hold every rank of the run where it is. Again and again: Slurm sends SIGCONT along with every signal, and on a
    busy machine a rank could save in between.
    """
    ranks = ranks_on_all_nodes(paths)

    def send(number: signal.Signals) -> None:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    send(signal.SIGSTOP)
    try:
        with again_and_again(lambda: send(signal.SIGSTOP), 0.002, urgent=True):
            yield
    finally:
        send(signal.SIGCONT)


@contextlib.contextmanager
def deadly(run: Run, node: str) -> Iterator[None]:
    """Kill every rank of the run on a node as soon as it writes its log."""
    space = pid_space(run.cluster.sandbox, node)

    def kill() -> None:
        for rank in find_ranks(run.paths):
            with contextlib.suppress(OSError, psutil.Error):
                if os.readlink(f"/proc/{rank.pid}/ns/pid") == space:
                    rank.kill()

    with again_and_again(kill, 0.05):
        yield


def pid_space(sandbox: Sandbox, node: str) -> str:
    """Name of the node's PID namespace: which of this machine's processes are the node's."""
    first = json.loads(sandbox.layout.identity(node).read_text())["pid"]
    return os.readlink(f"/proc/{first}/ns/pid")


def ranks_on_all_nodes(paths: RunPaths) -> list[psutil.Process]:
    ranks = find_ranks(paths)
    assert len(ranks) >= 2
    return ranks


def find_ranks(paths: RunPaths) -> list[psutil.Process]:
    """The ranks of a run: they write its rank logs. The sandbox's nodes are processes of this machine."""
    mark, ranks = f"{paths.root}/attempts/", []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            descriptors = os.scandir(f"/proc/{process.pid}/fd")
            targets = [os.readlink(descriptor.path) for descriptor in descriptors]
            if any(target.startswith(mark) and target.endswith(".err") for target in targets):
                ranks.append(process)
    return ranks


def outcome(paths: RunPaths, attempt: int = 0) -> dict:
    return json.loads(paths.attempt(attempt).outcome.read_text())


def ledger(path: Path, kind: str) -> list[dict]:
    return [record for record in read_json_lines(path) if record["event"] == kind]
