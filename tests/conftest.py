"""Shared by all tests: a model whose steps take milliseconds, and real runs of it through the real commands."""

from __future__ import annotations

import os

# before torch is loaded: tests run side by side, and threads that spin while they wait starve each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from encdec.checkpoints import logical_digest
from encdec.files import RunPaths
from encdec.records import read_json_lines

REPOSITORY = Path(__file__).resolve().parents[1]
MICRO = REPOSITORY / "tests" / "micro.yaml"
PATIENCE_SECONDS = 120.0


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts what it puts in the background deaf to Ctrl-C, and the commands under test would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Lab:
    """Starts real runs of the micro model in temporary run directories; all share one folder of packed text."""

    root: Path
    packed: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def arguments(self, *extra: str) -> list[str]:
        return ["--config", str(MICRO), "--set", f"data.packed_dir={self.packed}", *extra]

    def start(self, module: str, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start ``python -m module arguments`` (or ``launcher -m module arguments``) in the repository."""
        command = [*(launcher or (sys.executable,)), "-m", module, *arguments]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.started.append(process)
        return process

    def run(self, module: str, *arguments: str, launcher: tuple[str, ...] = ()) -> tuple[int, str]:
        """As ``start``, to its end: (exit code, output)."""
        process = self.start(module, *arguments, launcher=launcher)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, output

    def submit(self, run_dir: Path, *extra: str) -> tuple[int, str]:
        """Submit the micro sanity check into ``run_dir`` and follow it to its end."""
        arguments = ["--phase", "sanity_check", "--cluster", "local", "--run-dir", str(run_dir)]
        return self.run("launchers.submit", *arguments, *self.arguments(*extra))

    def start_submit(self, run_dir: Path, *extra: str) -> subprocess.Popen[str]:
        arguments = ["--phase", "sanity_check", "--cluster", "local", "--run-dir", str(run_dir)]
        return self.start("launchers.submit", *arguments, *self.arguments(*extra))

    def digest(self, checkpoint: Path) -> str:
        return logical_digest(checkpoint)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture
def lab(session_folder: Path, tmp_path: Path) -> Iterator[Lab]:
    """A lab whose leftovers (only processes it started itself) are ended after the test."""
    lab = Lab(tmp_path, session_folder / "packed")
    yield lab
    for process in lab.started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def twin(session_folder: Path) -> RunPaths:
    """The uninterrupted run that interrupted ones are compared with."""
    lab = Lab(session_folder, session_folder / "packed")
    code, output = lab.submit(session_folder / "twin")
    assert code == 0, output
    return RunPaths(session_folder / "twin")


@pytest.fixture(scope="session")
def twin_digest(twin: RunPaths, session_folder: Path) -> str:
    lab = Lab(session_folder, session_folder / "packed")
    code, output = lab.run("encdec.checkpoints", "digest", str(twin.checkpoints / "step-60"))
    assert code == 0, output
    return output.strip()


@pytest.fixture
def mounts() -> Iterator[Callable[..., None]]:
    """mount(*words): a real mount, undone after the test."""
    done: list[str] = []
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")

    def mount(*words: str) -> None:
        subprocess.run(["mount", *words], check=True)
        if words[-1] not in done:
            done.append(words[-1])

    yield mount
    for target in reversed(done):
        subprocess.run(["umount", "--lazy", target], check=True)


def losses(paths: RunPaths) -> dict[int, float]:
    """Loss by step, over all attempts; the newest record of a step counts."""
    numbers = paths.attempt_numbers()
    return {r["step"]: r["loss"] for n in numbers for r in read_json_lines(paths.attempt(n).steps)}


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_SECONDS:.0f} s until {what}")
        time.sleep(0.01)


def wait_for_step(paths: RunPaths, step: int, attempt: int = 0) -> None:
    """Until rank 0 of ``attempt`` has recorded ``step``."""
    steps = paths.attempt(attempt).steps
    wait_until(lambda: any(r["step"] >= step for r in read_json_lines(steps)), f"step {step} is recorded")


def agent_of(paths: RunPaths, attempt: int = 0) -> psutil.Process:
    return psutil.Process(json.loads(paths.attempt(attempt).process.read_text())["pid"])


def ranks_of(paths: RunPaths, attempt: int = 0) -> list[psutil.Process]:
    """The rank processes of a local attempt: grandchildren of its agent that carry a RANK."""
    found = []
    for child in agent_of(paths, attempt).children(recursive=True):
        try:
            # a forked rank sets RANK itself, which /proc/environ does not show: it is the forkserver's child
            if child.ppid() != agent_of(paths, attempt).pid:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def kill_everything(paths: RunPaths, attempt: int = 0) -> None:
    """SIGKILL the agent, submitit's controller and every rank, as a power failure would."""
    agent = agent_of(paths, attempt)
    victims = [*agent.children(recursive=True), agent]
    for victim in victims:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(victims, timeout=10)
