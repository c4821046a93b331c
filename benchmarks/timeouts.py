"""Proof over many time-outs: one run on a real Slurm, warned again and again, loses no step and no continuation.

    python -m benchmarks.timeouts --continuations 200

Needs root: it brings up a sandbox of one node, and takes it down. Only the moment of the warning is drawn: Slurm's may
come up to a minute early, so here it comes 0 to ``--early`` seconds after the attempt's first step. The hold-off before
a requeued job starts again is lifted at once, without the two seconds that Slurm needs: now and then it makes the new
start FAILED before it runs anything, and the successor that is the net has to go on. At the end every step must have
been computed, and once.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.peers import markdown
from benchmarks.slurm_peers import SlurmJob, new_sandbox, submit, wait_until
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


def times_by_net(job: SlurmJob) -> int:
    """How often a requeued job ended before it ran anything, and its successor went on."""
    attempts = map(job.paths.attempt, job.paths.attempt_numbers())
    ran = [read_record(attempt.process, ProcessRecord).job for attempt in attempts]
    return sum(before != after for before, after in itertools.pairwise(ran))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--continuations", type=int, default=200, help="warnings in all (default: 200)")
    parser.add_argument("--early", type=float, default=60, help="latest moment of the warning, s (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--keep", type=Path, help="move the run directory and the cluster's logs here at the end")
    arguments = parser.parse_args(argv)
    moments, done, broken = random.Random(arguments.seed), 0, ""
    began = time.monotonic()
    with new_sandbox(nodes=1) as (sandbox, folder):
        enough = ("--max-attempts", str(arguments.continuations + 9))
        job = submit("ours", sandbox, folder / "run", folder / "packed", flags=enough)
        wait_until(lambda: has_stepped(job, 0), "the first step")
        try:
            for attempt in track(range(arguments.continuations), "continuations", console=Console(stderr=True)):
                time.sleep(moments.uniform(0, arguments.early))
                warn(job, attempt)
                done += 1
        except TimeoutError as error:
            broken = f"{error}; Slurm says {job.state() or 'nothing'}"
        job.paths.stop_request.touch()
        wait_until(lambda: job.paths.attempt(job.paths.attempt_numbers()[-1]).outcome.is_file(), "the stop")
        counts = Counter(record["step"] for record in job.steps())
        by_net = times_by_net(job)
        if arguments.keep:
            shutil.copytree(sandbox.layout.log, arguments.keep / "log")
            shutil.move(folder / "run", arguments.keep / "run")
    last = max(counts)
    lost = last - len(counts)
    twice = sum(count - 1 for count in counts.values())
    rows = [
        ["continuations", f"{done} of {arguments.continuations}"],
        ["of these by the net", str(by_net)],
        ["chains broken", f"1: {broken}" if broken else "0"],
        ["steps computed", f"{last:,}"],
        ["steps lost", str(lost)],
        ["steps computed twice", str(twice)],
        ["minutes", f"{(time.monotonic() - began) / 60:.0f}"],
    ]
    print(markdown(["", ""], rows))
    return 1 if broken or lost or twice else 0


if __name__ == "__main__":
    sys.exit(main())
