"""The same rank program as a Slurm job, by our launcher and by a submitit Checkpointable, on a sandbox of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import submitit

from benchmarks.checkpointable import Training
from benchmarks.peers import PATIENCE_SECONDS, REPOSITORY, program_arguments
from encdec.files import RunPaths
from encdec.records import read_json_lines
from launchers.remote import clean_environment
from launchers.sandbox.cluster import Sandbox
from launchers.sandbox.layout import Shape

PEERS = ("ours", "submitit")
SETTINGS = (
    "training.num_train_steps=1000000",
    "training.total_tokens=1000000000000",
    "training.eval_samples=0",
    "training.early_stopping_enabled=false",
)
"""A run that does not end by itself."""
RANKS = 2
TIME_LIMIT_MINUTES = 60
SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class SlurmJob:
    """One submitted run."""

    sandbox: Sandbox
    job: str
    paths: RunPaths

    def state(self) -> str:
        """Slurm's word for it; empty once Slurm has forgotten it."""
        return self.sandbox.run("squeue", "-h", "-j", self.job, "-t", "all", "-o", "%T", check=False).strip()

    def steps(self) -> list[dict]:
        """The step records of all attempts, in order."""
        numbers = self.paths.attempt_numbers()
        return [record for number in numbers for record in read_json_lines(self.paths.attempt(number).steps)]

    def end(self) -> None:
        """Kill it, and wait until its node is free. A request to end would be a request to save."""
        for request in (["--signal=KILL"], []):
            self.sandbox.run("scancel", *request, self.job, check=False)
        wait_until(lambda: not self.sandbox.run("squeue", "-h", "-j", self.job, check=False), "the job is gone")


@contextlib.contextmanager
def new_sandbox(nodes: int) -> Iterator[tuple[Sandbox, Path]]:
    """A cluster and a folder that all its nodes see; both are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir="/var/tmp"))  # /tmp is often small, and in memory
    sandbox = Sandbox(folder / "cluster")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that a request to end clears away
    try:
        sandbox.up(Shape(nodes=nodes))
        yield sandbox, folder
    finally:
        if sandbox.layout.exists:
            sandbox.down()
        shutil.rmtree(folder)


@contextlib.contextmanager
def login(sandbox: Sandbox) -> Iterator[None]:
    """This process on the login node of the sandbox."""
    with clean_environment():
        # the ranks share this machine's cores: threads that spin while they wait would slow the others down
        os.environ.update(sandbox.environment, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        yield


def submit(
    peer: str,
    sandbox: Sandbox,
    root: Path,
    packed: Path,
    *settings: str,
    ranks: int = RANKS,
    flags: tuple[str, ...] = (),
) -> SlurmJob:
    """Submit the micro run on one node under ``peer``: ``ours``, with more ``flags``, or ``submitit``."""
    with login(sandbox):
        job = (
            ours(root, packed, *settings, ranks=ranks, flags=flags)
            if peer == "ours"
            else by_submitit(root, packed, *settings, ranks=ranks)
        )
    return SlurmJob(sandbox, job, RunPaths(root))


def ours(root: Path, packed: Path, *settings: str, ranks: int, flags: tuple[str, ...]) -> str:
    done = subprocess.run(
        [*command(root, packed, *settings, ranks=ranks), *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads((root / "job.json").read_text())["job"]


def command(root: Path, packed: Path, *settings: str, ranks: int = RANKS) -> list[str]:
    """Our command line; given again with ``--wait`` it follows the job that is there."""
    where = ["--cluster", "slurm", "--run-dir", str(root), "--time", str(TIME_LIMIT_MINUTES)]
    program = program_arguments(packed, *SETTINGS, *settings, ranks=ranks)
    return [sys.executable, "-m", "launchers.submit", *where, *program]


def by_submitit(root: Path, packed: Path, *settings: str, ranks: int) -> str:
    executor = submitit.SlurmExecutor(folder=root / "submitit")
    executor.update_parameters(
        nodes=1, ntasks_per_node=ranks, cpus_per_task=1, time=TIME_LIMIT_MINUTES,
        setup=[f"export PYTHONPATH={REPOSITORY}"],
    )  # fmt: skip
    program = program_arguments(packed, *SETTINGS, *settings, ranks=ranks)
    return executor.submit(Training("--output_dir", str(root), *program)).job_id


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Raises TimeoutError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s until {what}")
        time.sleep(SECONDS_BETWEEN_LOOKS)
