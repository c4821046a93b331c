"""Warning -> the successor's first new step on Slurm: our launcher against a submitit Checkpointable, in turns.

    python -m benchmarks.requeue --rounds 5

Needs root: it brings up a sandbox of one node, and takes it down. In every round each peer trains the same program on
two ranks, is warned with SIGUSR2 as before a time limit, saves, has itself requeued, and goes on. Slurm's hold-off
(about two minutes on a real cluster) is lifted at once, and no part of the total.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from benchmarks.peers import markdown, percentile
from benchmarks.slurm_peers import PEERS, SECONDS_BETWEEN_LOOKS, SlurmJob, new_sandbox, submit, wait_until
from encdec.records import read_json_lines
from launchers.sandbox.cluster import Sandbox
from launchers.slurm import END_STATES, SOON

STEPS_BEFORE_WARNING = 20
SAVE_STEPS = "training.save_steps=1000"  # so a save before the warning does not shorten the one after it
MOMENTS = {
    "warned": "",
    "saved": "warning -> last step saved",
    "outcome": "-> outcome written",
    "pending": "-> pending again",
    "running": "-> running again, hold-off lifted (not counted)",
    "agent": "-> agent ready",
    "step": "-> first new step",
}
"""What happens in a round, in order -> the name of the part that ends with it."""


@dataclass
class Round:
    """One warning and what followed. Times are seconds since the epoch."""

    moments: dict[str, float] = field(default_factory=dict)
    twice: int = 0
    """Steps computed by both attempts."""
    lost: int = 0
    """Steps that no attempt has recorded, below the last."""
    ended: str = ""
    """Slurm's word for a job that did not go on."""
    hold_off: float = 0.0
    """Seconds that Slurm would have held the requeued job."""

    @property
    def total(self) -> float | None:
        """Seconds from the warning to the first new step, the hold-off excluded; None if there was no such step."""
        if "step" not in self.moments:
            return None
        held = self.moments.get("running", 0.0) - self.moments.get("pending", 0.0)
        return self.moments["step"] - self.moments["warned"] - held

    def parts(self) -> dict[str, float]:
        """Seconds between each moment and the last known one before it."""
        known = [moment for moment in MOMENTS if moment in self.moments]
        return {now: self.moments[now] - self.moments[before] for before, now in itertools.pairwise(known)}


def play(peer: str, sandbox: Sandbox, root: Path, packed: Path, patience: float) -> Round:
    """Submit, warn, and watch until the next attempt has done a new step, or for ``patience`` seconds."""
    job = submit(peer, sandbox, root, packed, SAVE_STEPS)
    try:
        wait_until(lambda: len(job.steps()) >= STEPS_BEFORE_WARNING, f"{peer} trains")
        played = Round({"warned": time.time()})
        sandbox.run("scancel", "--signal=USR2", job.job)
        deadline = time.monotonic() + patience
        while not first_of_next(job) and time.monotonic() < deadline and job_goes_on(job, played):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        read_ledgers(job, played)
    finally:
        job.end()
    return played


def job_goes_on(job: SlurmJob, played: Round) -> bool:
    """Look at the queue until the job runs again; lift the hold-off once. False if the job has ended."""
    if "running" in played.moments:
        return True  # from here on its files tell, and nobody is asked
    ended_before, state = played.ended, job.state()
    if state == "PENDING" and "pending" not in played.moments:
        played.moments["pending"] = time.time()
        queued, start = job.sandbox.run("squeue", "-h", "-j", job.job, "-o", "%V %S").split()
        played.hold_off = (datetime.fromisoformat(start) - datetime.fromisoformat(queued)).total_seconds()
        job.sandbox.run("scontrol", "update", f"jobid={job.job}", f"starttime={SOON}")
    elif state == "RUNNING" and "pending" in played.moments:
        played.moments["running"] = time.time()
    played.ended = state if state in END_STATES else ""
    return not (played.ended and ended_before)  # on its way to a requeue a job may pass through an end state


def first_of_next(job: SlurmJob) -> dict | None:
    """The first step of the second attempt."""
    return next(read_json_lines(job.paths.attempt(1).steps), None)


def read_ledgers(job: SlurmJob, played: Round) -> None:
    """What the run directory says about the round."""
    before, after = job.paths.attempt(0), job.paths.attempt(1)
    saves = [record["time"] for record in read_json_lines(before.events("rank-0")) if record["event"] == "saved"]
    ready = [record["time"] for record in read_json_lines(after.events("node-0")) if record["event"] == "agent_ready"]
    if saves and saves[-1] > played.moments["warned"]:
        played.moments["saved"] = saves[-1]
    if before.outcome.is_file():
        played.moments["outcome"] = json.loads(before.outcome.read_text())["time"]
    if ready:
        played.moments["agent"] = ready[0]
    if first := first_of_next(job):
        played.moments["step"] = first["time"]
    steps = [record["step"] for record in job.steps()]
    played.twice, played.lost = len(steps) - len(set(steps)), max(steps) - len(set(steps))


def column(rounds: list[Round], patience: float) -> list[str]:
    """One peer's column of the table."""
    parts = [played.parts() for played in rounds]
    totals = [played.total for played in rounds if played.total is not None]
    cells = [median([part[moment] for part in parts if moment in part]) for moment in list(MOMENTS)[1:]]
    missed = len(rounds) - len(totals)
    states = " ".join(sorted({played.ended for played in rounds if played.ended}))
    late = f", {missed} of {len(rounds)} not continued in {patience:.0f} s {states}".rstrip()
    total = median(totals) + (late if missed else "")
    steps = (sum(played.twice for played in rounds), sum(played.lost for played in rounds))
    return [*cells, total, f"{max(totals):.2f}" if totals else "-", *map(str, steps)]


def median(values: list[float]) -> str:
    return f"{percentile(values, 50):.2f}" if values else "-"


def report(rounds: dict[str, list[Round]], patience: float) -> str:
    """The table, p50 of each part in seconds, and the ratio of the totals."""
    names = [*list(MOMENTS.values())[1:], "total, p50", "total, largest", "steps computed twice", "steps lost"]
    columns = [column(rounds[peer], patience) for peer in PEERS]
    table = markdown(["p50, seconds", *PEERS], [list(row) for row in zip(names, *columns, strict=True)])
    held = [played.hold_off for peer in PEERS for played in rounds[peer] if played.hold_off]
    totals = [[played.total for played in rounds[peer] if played.total is not None] for peer in PEERS]
    ratio = f"{percentile(totals[0], 50) / percentile(totals[1], 50):.2f}" if all(totals) else "-"
    return f"{table}\n\nours / submitit: {ratio}. Hold-off that Slurm asked for, lifted: {median(held)} s."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="warnings per peer (default: 5)")
    parser.add_argument("--patience", type=float, default=120, help="seconds until a job counts as not continued (120)")
    parser.add_argument("--json", type=Path, help="also write the moments of every round to this file")
    arguments = parser.parse_args(argv)
    rounds: dict[str, list[Round]] = {peer: [] for peer in PEERS}
    with new_sandbox(nodes=1) as (sandbox, folder):
        for number in range(-1, arguments.rounds):  # the first round packs the text and is not counted
            for peer in PEERS:
                root = folder / f"{peer}-{number}"
                played = play(peer, sandbox, root, folder / "packed", arguments.patience)
                print(f"{peer}: round {number + 1}/{arguments.rounds}: {played.total} {played.ended}", file=sys.stderr)
                if number >= 0:
                    rounds[peer].append(played)
    print(report(rounds, arguments.patience))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({peer: [vars(p) for p in rounds[peer]] for peer in PEERS}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
