"""The same rank program started by our launcher and by torchrun, on the micro model of the tests."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from encdec.files import RunPaths
from encdec.records import read_json_lines

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "tests" / "micro.yaml"
PATIENCE_SECONDS = 120.0
PEERS = ("ours", "torchrun")


@dataclass
class Start:
    """One start of the program."""

    process: subprocess.Popen[bytes]
    paths: RunPaths
    began: float
    """time.time() just before the command was started."""

    def newest_step(self) -> int:
        """Highest step recorded so far by any attempt."""
        return max((int(record["step"]) for record in self.records()), default=0)

    def records(self) -> Iterator[dict]:
        for number in self.paths.attempt_numbers():
            yield from read_json_lines(self.paths.attempt(number).steps)

    def ranks(self) -> list[psutil.Process]:
        """The rank processes: those below the started command that hold a listening or joined process group."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if is_rank(child):
                    found.append(child)
        return found

    def end(self) -> None:
        """End everything this start began."""
        tree = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(tree, timeout=10)
        self.process.wait()


def is_rank(process: psutil.Process) -> bool:
    """torchrun's ranks carry ``-m encdec.train``; ours are forks, so children, of the forkserver."""
    words = process.cmdline()
    if "encdec.train" in words and "torch.distributed.run" not in words:
        return True
    parent = process.parent()
    return parent is not None and any("forkserver" in word for word in parent.cmdline())


def program_arguments(packed: Path, *settings: str, ranks: int) -> list[str]:
    """What every launcher passes on: the micro run with ``settings``, its packed text in ``packed``."""
    arguments = ["--phase", "sanity_check", "--config", str(CONFIG)]
    for setting in (f"data.packed_dir={packed}", f"infra.num_gpus={ranks}", *settings):
        arguments += ["--set", setting]
    return arguments


def start(peer: str, root: Path, packed: Path, *settings: str, ranks: int = 2) -> Start:
    """Start the micro run under ``peer``: ``ours`` (python -m launchers.submit) or ``torchrun``."""
    shared = program_arguments(packed, *settings, ranks=ranks)
    commands = {
        "ours": [sys.executable, "-m", "launchers.submit", "--cluster", "local", "--run-dir", str(root)],
        "torchrun": [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", "1000",
            "-m", "encdec.train", "--output_dir", str(root),
        ],
    }  # fmt: skip
    # without the second setting torchrun's restarted ranks find the dead ones' keys in a shared store, and can hang
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    began = time.time()
    process = subprocess.Popen(
        [*commands[peer], *shared],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return Start(process, RunPaths(root), began)


def wait_for_step(run: Start, step: int) -> dict:
    """The first record of a step >= ``step``; its ``time`` says when it was done."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        for record in run.records():
            if record["step"] >= step:
                return record
        if run.process.poll() is not None:
            raise RuntimeError(f"{run.process.args} ended with {run.process.returncode} before step {step}")
        time.sleep(0.01)
    raise TimeoutError(f"no step {step} within {PATIENCE_SECONDS:.0f} s")


def percentile(values: list[float], percent: float) -> float:
    """Nearest-rank percentile: of few values the 99th is the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def emit(result: dict, path: Path | None) -> None:
    """Print as JSON, and write it where asked."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table as RESULTS.md holds it."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
