"""What a refresh of launchers.monitor costs with many runs that live, and what of it is the first look.

    python -m benchmarks.monitor --runs 100 --looks 20

Makes run directories as running jobs leave them: each with a few past attempts, thousands of step records and a ledger.
Between two looks each run writes new steps, heartbeats, and now and then an event, as it would in the seconds between.
A refresh is what the live view does every two seconds: reading what is new, judging each run, drawing the screen (here
of a terminal that is not there, 160x50). Slurm is not asked: it is asked by another thread, seldom. CPU seconds of this
process, of one core; the median of all looks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.peers import REPOSITORY, markdown
from encdec.files import RunPaths, atomic_write_json
from encdec.records import ContinuationRecord, JobRecord, JsonLinesWriter, Outcome, ProcessRecord, StepRecord, event
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import resolve_run
from launchers.monitor.app import Monitor
from launchers.monitor.observatory import Observatory, SlurmWatch
from launchers.names import runs_under
from launchers.slurm import JobState, Listing
from launchers.views.growing_files import Memory
from launchers.views.overview import read_or_damage

NODES = 4
PAST_ATTEMPTS = 3
STEPS_BETWEEN_LOOKS = 4
"""At half a second a step."""
SIZE = (160, 50)


class LiveRun:
    """A run directory whose newest attempt seems to run in a Slurm job."""

    def __init__(self, root: Path, number: int, steps: int) -> None:
        self.paths, self.job = RunPaths(root / f"medium-{number:03d}"), str(1000 + number)
        self.paths.make()
        resolve_run(TrainingPhase.SANITY_CHECK, config_file=REPOSITORY / "tests" / "micro.yaml").write(
            self.paths.run_yaml
        )
        atomic_write_json(
            self.paths.job, JobRecord(submission="ab", job=self.job, submitted=time.time() - 9000).to_json()
        )
        atomic_write_json(self.paths.continuation, ContinuationRecord(job=self.job).to_json())
        self.step = 0
        for attempt in range(PAST_ATTEMPTS + 1):
            self._begin()
            self.train(steps // (PAST_ATTEMPTS + 1))
            if attempt < PAST_ATTEMPTS:
                outcome = Outcome(cause="signalled", exit_code=75, step=self.step, checkpoint=None, message="stopped")
                atomic_write_json(self.place.outcome, outcome.to_json())
        (self.paths.checkpoints / f"step-{self.step}").mkdir()

    def _begin(self) -> None:
        self.place = self.paths.attempt(self.paths.claim_attempt())
        record = ProcessRecord(host="n1", pid=1, created=time.time() - 8000, job=self.job)
        atomic_write_json(self.place.process, record.to_json())
        self.tell("node-0", "agent_ready", node=0)

    def tell(self, writer: str, kind: str, **facts: object) -> None:
        with JsonLinesWriter(self.place.events(writer)) as ledger:
            ledger.write(event(kind, **facts))

    def train(self, steps: int) -> None:
        """So many steps more, and all nodes heard of."""
        record = StepRecord(
            step=0, loss=3.0, grad_norm=1.0, learning_rate=1e-3, tokens_seen=0, tokens_per_second=9000.0,
            step_seconds=0.5, data_seconds=0.01, samples_consumed=0, memory_gb=0.4, attempt=0, restart=0,
        )  # fmt: skip
        with JsonLinesWriter(self.place.steps) as writer:
            for _ in range(steps):
                self.step += 1
                writer.write(replace(record, step=self.step, loss=3.0 + 1.0 / self.step).to_json())
        for node in range(NODES):
            self.place.heartbeat(node).touch()


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds that a call takes."""
    before = time.process_time()
    work()
    return time.process_time() - before


async def drawn(observatory: Observatory, between: Callable[[], None], looks: int) -> tuple[list[float], list[float]]:
    """CPU seconds of each of so many refreshes, and of what of it is reading; ``between`` happens before each."""
    app, all_of_it, reading = Monitor(observatory, on_its_own=False), [], []
    async with app.run_test(size=SIZE) as pilot:
        app.show(observatory.look())
        await pilot.pause()
        for _ in range(looks):
            between()
            before = time.process_time()
            board = observatory.look()
            reading.append(time.process_time() - before)
            app.show(board)
            await pilot.pause()
            all_of_it.append(time.process_time() - before)
    return all_of_it, reading


def measure(root: Path, runs: int, steps: int, looks: int) -> dict[str, float]:
    """CPU seconds by what was done."""
    lives = [LiveRun(root, number, steps) for number in range(runs)]
    said = Listing({run.job: JobState("RUNNING") for run in lives}, None)
    observatory = Observatory(lambda: runs_under(root), SlurmWatch(listing=said, asked=time.time()))

    def train() -> None:
        for run in lives:
            run.train(STEPS_BETWEEN_LOOKS)
        for run in lives[:: max(1, runs // 10)]:
            run.tell("rank-0", "saved", step=run.step, checkpoint=f"step-{run.step}", seconds=1.0)

    first = cpu(observatory.look)
    live, reading = asyncio.run(drawn(observatory, train, looks))
    idle, _ = asyncio.run(drawn(observatory, lambda: None, looks))
    anew = cpu(lambda: [read_or_damage(run.paths, Memory()) for run in lives])
    return {
        "first look": first,
        "refresh, all runs have trained on": statistics.median(live),
        "of that, reading and judging": statistics.median(reading),
        "refresh, nothing new": statistics.median(idle),
        "reading all anew": anew,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="run directories (default: 100)")
    parser.add_argument("--steps", type=int, default=4000, help="step records of each (default: 4000)")
    parser.add_argument("--looks", type=int, default=20, help="refreshes measured (default: 20)")
    parser.add_argument("--json", type=Path, help="also write the CPU seconds to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), arguments.runs, arguments.steps, arguments.looks)
    rows = [
        [name, f"{1000 * seconds:.0f}", f"{1000 * seconds / arguments.runs:.2f}"] for name, seconds in measured.items()
    ]
    print(markdown([f"{arguments.runs} runs of {arguments.steps:,} steps", "CPU, ms", "a run, ms"], rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
