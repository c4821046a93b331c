"""Proof over many time-outs: runs on a real Slurm, warned again and again, lose no step and no continuation.

    python -m benchmarks.timeouts --continuations 200

Needs root: it brings up a sandbox of one node per run, and takes it down. Only the moment of the warning is drawn:
Slurm's may come up to a minute early, so here it comes 0 to ``--early`` seconds after the attempt's first step. The
hold-off before a requeued job starts again is lifted at once, without the two seconds that Slurm needs: now and then
that makes the new start FAILED before it runs anything, and the successor that is the net has to go on. At the end
every step must have been computed, and once.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from benchmarks.peers import markdown
from benchmarks.slurm_peers import SlurmJob, new_sandbox, submit, wait_until
from encdec.errors import EncdecError
from encdec.records import ProcessRecord, read_json_lines, read_record
from launchers.jobs import jobs_of

PATIENCE_SECONDS = 120.0
"""After which a run that was warned and has done no new step counts as broken."""


def has_stepped(job: SlurmJob, attempt: int) -> bool:
    return next(read_json_lines(job.paths.attempt(attempt).steps), None) is not None


def warn(job: SlurmJob, attempt: int) -> None:
    """Warn the job that runs ``attempt``, and wait until the next attempt has done a step.

    Raises:
        TimeoutError: it has not in PATIENCE_SECONDS.
    """
    current = jobs_of(job.paths)[0]
    job.sandbox.run("scancel", "--signal=USR2", current)
    lifted = False

    def goes_on() -> bool:
        nonlocal lifted
        if not lifted and job.paths.attempt(attempt).outcome.is_file():
            queued = job.sandbox.run("squeue", "-h", "-j", current, "-o", "%T %r", check=False).split()
            if queued == ["PENDING", "BeginTime"]:
                job.sandbox.run("scontrol", "update", f"jobid={current}", "starttime=now")
                lifted = True
        return has_stepped(job, attempt + 1)

    wait_until(goes_on, f"attempt {attempt + 1} has done a step", PATIENCE_SECONDS)


@dataclass
class Chain:
    """One run through its warnings, and what became of it."""

    job: SlurmJob
    warnings: int
    done: int = 0
    broken: str = ""
    """Why it went on no more."""

    def play(self, early: float, moments: random.Random, advance: Callable[[], None], given_up: Event) -> None:
        """Warn it again and again, each time 0 to ``early`` seconds after the first step; then have it stop."""
        paths = self.job.paths
        try:
            wait_until(lambda: has_stepped(self.job, 0), "the first step")
            for attempt in range(self.warnings):
                if given_up.wait(moments.uniform(0, early)):
                    return
                warn(self.job, attempt)
                self.done += 1
                advance()
            paths.stop_request.touch()
            wait_until(paths.attempt(paths.attempt_numbers()[-1]).outcome.is_file, "the stop")
        except (TimeoutError, EncdecError, subprocess.SubprocessError) as error:
            self.broken = f"{paths.root.name}: {error}; Slurm says {self.job.state() or 'nothing'}"

    def steps(self) -> Counter[int]:
        """How often each step was computed."""
        return Counter(record["step"] for record in self.job.steps())

    def times_by_net(self) -> int:
        """How often a requeued job ended before it ran anything, and its successor went on."""
        attempts = map(self.job.paths.attempt, self.job.paths.attempt_numbers())
        ran = [read_record(attempt.process, ProcessRecord).job for attempt in attempts]
        return sum(before != after for before, after in itertools.pairwise(ran))


def play_all(chains: list[Chain], early: float, seed: int) -> None:
    """All runs at once, with a bar for all."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(len(chains)) as pool:
        task = bar.add_task("continuations", total=sum(chain.warnings for chain in chains))
        draws = [random.Random(f"{seed} {number}") for number in range(len(chains))]
        given_up = Event()
        played = [
            pool.submit(chain.play, early, moments, lambda: bar.advance(task), given_up)
            for chain, moments in zip(chains, draws, strict=True)
        ]
        try:
            for chain in played:
                chain.result()
        finally:
            given_up.set()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--continuations", type=int, default=200, help="warnings in all (default: 200)")
    parser.add_argument("--runs", type=int, default=4, help="runs that share them, side by side (default: 4)")
    parser.add_argument("--early", type=float, default=60, help="latest moment of the warning, s (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--keep", type=Path, help="move the run directories and the cluster's logs here at the end")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.runs <= arguments.continuations:
        parser.error(f"--runs must lie between 1 and --continuations, is {arguments.runs}; give fewer runs")
    began = time.monotonic()
    each, left = divmod(arguments.continuations, arguments.runs)
    chains = []
    with new_sandbox(nodes=arguments.runs) as (sandbox, folder):
        for number in range(arguments.runs):
            warnings = each + (number < left)
            enough = ("--max-attempts", str(warnings + 9))
            chains.append(
                Chain(submit("ours", sandbox, folder / f"run-{number}", folder / "packed", flags=enough), warnings)
            )
        try:
            play_all(chains, arguments.early, arguments.seed)
            counts = [chain.steps() for chain in chains]
            by_net = sum(chain.times_by_net() for chain in chains)
        finally:
            if arguments.keep:
                shutil.copytree(sandbox.layout.log, arguments.keep / "log")
                for chain in chains:
                    shutil.move(chain.job.paths.root, arguments.keep)
    done, broken = sum(chain.done for chain in chains), [chain.broken for chain in chains if chain.broken]
    lost = sum(max(steps, default=0) - len(steps) for steps in counts)
    twice = sum(steps.total() - len(steps) for steps in counts)
    rows = [
        ["continuations", f"{done} of {arguments.continuations}"],
        ["of these by the net", str(by_net)],
        ["chains broken", "; ".join([str(len(broken)), *broken])],
        ["steps computed", f"{sum(max(steps, default=0) for steps in counts):,}"],
        ["steps lost", str(lost)],
        ["steps computed twice", str(twice)],
        ["minutes", f"{(time.monotonic() - began) / 60:.0f}"],
    ]
    print(markdown(["", ""], rows))
    return 1 if broken or lost or twice or done < arguments.continuations else 0


if __name__ == "__main__":
    sys.exit(main())
