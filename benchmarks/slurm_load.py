"""Requests a minute that a running job costs Slurm's daemons, above an idle cluster: ours and submitit's polling.

    python -m benchmarks.slurm_load --seconds 60

Needs root: it brings up a sandbox of its own, where nobody else asks anything, and takes it down. The counters are
those of slurmctld (sdiag) and slurmdbd (sacctmgr show stats). Each situation is counted in two windows, because who
polls may begin eagerly and calm down; the watchers start with the first. One squeue is three requests, one sacct one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.peers import REPOSITORY, markdown
from benchmarks.slurm_peers import SlurmJob, command, login, new_sandbox, submit, wait_until
from launchers.sandbox.cluster import Sandbox

COUNTER = re.compile(r"^\s+([A-Z][A-Z_]+)\s+\(\s*\d+\)\s+count:(\d+)", re.MULTILINE)
QUESTION = re.compile(r"REQUEST_\w*(INFO|PING|READY)\w*|DBD_GET_\w+")
"""Requests that ask. The others (a node reports, accounting is written, a connection opens) are Slurm's own."""
MEASURING = {"REQUEST_STATS_INFO", "DBD_GET_STATS"}
WAIT_FOR_JOB = "import sys, submitit; submitit.SlurmJob(folder=sys.argv[1], job_id=sys.argv[2]).wait()"
WINDOWS = ("first window", "second window")
STEPS_UNTIL_STEADY = 5


def counters(sandbox: Sandbox) -> Counter[str]:
    """Requests so far by type, of both daemons."""
    listings = sandbox.run("sdiag") + sandbox.run("sacctmgr", "show", "stats")
    return Counter({name: int(count) for name, count in COUNTER.findall(listings) if name not in MEASURING})


def measure(sandbox: Sandbox, seconds: float) -> list[Counter[str]]:
    """Requests in each of two windows of ``seconds``, by type."""
    readings = [counters(sandbox)]
    for _ in WINDOWS:
        time.sleep(seconds)
        readings.append(counters(sandbox))
    return [after - before for before, after in itertools.pairwise(readings)]


def follow(job: SlurmJob, packed: Path) -> list[str]:
    """Our command, which finds the job and follows it."""
    return [*command(job.paths.root, packed), "--wait"]


def wait(job: SlurmJob, packed: Path) -> list[str]:
    """A program that waits as submitit's users do."""
    return [sys.executable, "-c", WAIT_FOR_JOB, str(job.paths.submitit), job.job]


SITUATIONS: dict[str, tuple[str | None, Callable[[SlurmJob, Path], list[str]] | None]] = {
    "idle cluster": (None, None),
    "ours, unattended": ("ours", None),
    "ours, followed with --wait": ("ours", follow),
    "submitit, job.wait()": ("submitit", wait),
}
"""What goes on -> (who runs a job, who watches it)."""


@contextlib.contextmanager
def situation(name: str, sandbox: Sandbox, folder: Path) -> Iterator[None]:
    """A job that trains, and its watcher."""
    peer, watcher = SITUATIONS[name]
    if peer is None:
        yield
        return
    job = submit(peer, sandbox, folder / f"run-{time.time_ns()}", folder / "packed")
    try:
        wait_until(lambda: len(job.steps()) >= STEPS_UNTIL_STEADY, f"{peer} trains")
        with watching(watcher(job, folder / "packed"), sandbox) if watcher else contextlib.nullcontext():
            yield
    finally:
        job.end()


@contextlib.contextmanager
def watching(argv: list[str], sandbox: Sandbox) -> Iterator[None]:
    """The watcher as a process of its own; it must still watch at the end."""
    with login(sandbox):
        process = subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"{argv} ended with {process.returncode} while its job ran")
    finally:
        process.kill()
        process.wait()


def report(measured: dict[str, list[Counter[str]]], seconds: float) -> str:
    """Questions a minute above those of the idle cluster, and which."""
    baseline = measured["idle cluster"]
    rows = []
    for name, windows in measured.items():
        above = [
            window if name == "idle cluster" else window - idle for window, idle in zip(windows, baseline, strict=True)
        ]
        asked = [Counter({kind: n for kind, n in window.items() if QUESTION.fullmatch(kind)}) for window in above]
        rates = [f"{window.total() * 60 / seconds:.1f}" for window in asked]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sum(asked, Counter()).most_common())
        rows.append([name, *rates, kinds or "nothing"])
    return markdown(["questions a minute, above the idle cluster", *WINDOWS, "both windows together"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="length of a window in seconds (default: 60)")
    parser.add_argument("--json", type=Path, help="also write all counts, Slurm's own among them, to this file")
    arguments = parser.parse_args(argv)
    measured = {}
    with new_sandbox(nodes=1) as (sandbox, folder):
        for name in SITUATIONS:
            with situation(name, sandbox, folder):
                print(f"{name}: two windows of {arguments.seconds:g} s", file=sys.stderr)
                measured[name] = measure(sandbox, arguments.seconds)
    print(report(measured, arguments.seconds))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
