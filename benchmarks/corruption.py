"""Proof over corruption: whatever happens to the files of a checkpoint is found, named, and passed over.

    python -m benchmarks.corruption --injections 10000

Three sets of checkpoints are made by real runs of the micro model: of two ranks, of another attempt on one rank, and
of another configuration. Each injection lays the first set out anew, damages its newest checkpoint (some damages reach
the one before, too), and asks the manager for the newest valid one. That must be the newest of which nothing was
damaged; the reason must name what is wrong; and what is proven wrong must lie in quarantine with it. After every tenth
injection comes a control that is no damage, and must not be objected to. Exits 1 if one thing goes wrong. As root it
works as nobody.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.damages import CONTROLS, DAMAGES
from benchmarks.injections import Material, Tally, open_field, run_injections
from benchmarks.peers import markdown
from benchmarks.undisturbed import make_run, run_undisturbed
from launchers.arguments import SHARDINGS

STEPS = "training.num_train_steps=12"
"""Checkpoints of steps 4, 8 and 12."""
INJECTIONS_PER_CONTROL = 10


def make_material(folder: Path, engine: str) -> Material:
    """Three sets of checkpoints by real runs under ``folder``; ``engine``: infra.distributed_type."""
    packed, settings = folder / "packed", (STEPS, f"infra.distributed_type={engine}")
    run = make_run(folder / "run", packed, *settings)
    run_undisturbed(run)
    alone = make_run(folder / "attempt", packed, *settings, ranks=1, like=run)
    alone.claim_attempt()
    run_undisturbed(alone, ranks=1)
    other = make_run(folder / "other", packed, *settings, "training.seed=7", like=run)
    run_undisturbed(other)
    return Material(run.checkpoints, alone.checkpoints, other.checkpoints)


def tables(tally: Tally, minutes: float) -> str:
    """What was counted, as RESULTS.md holds it."""
    columns = (tally.injected, tally.detected, tally.named, tally.fallen_back)
    rows = [[name, *(str(column[name]) for column in columns)] for name in DAMAGES]
    rows.append(["all", *(str(column.total()) for column in columns)])
    controls = [[name, str(tally.controls[name]), str(tally.alarms[name])] for name in CONTROLS]
    controls.append(["all", str(tally.controls.total()), str(tally.alarms.total())])
    header = ["damage", "injected", "detected", "reason named", "fell back"]
    return "\n\n".join(
        [markdown(header, rows), markdown(["no damage", "tried", "false alarms"], controls), f"Minutes: {minutes:.1f}"]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injections", type=int, default=10_000, help="damages in all (default: 10000)")
    parser.add_argument("--sharding", choices=SHARDINGS, default="fsdp2", help="engine (default: fsdp2)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    arguments = parser.parse_args(argv)
    logging.getLogger("encdec.train").setLevel(logging.ERROR)  # what it warns of is counted here
    began = time.monotonic()
    columns = (TextColumn("injections"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=arguments.injections)
        with open_field(make_material(Path(folder), SHARDINGS[arguments.sharding]), Random(arguments.seed)) as field:
            tally = run_injections(
                field, arguments.injections, INJECTIONS_PER_CONTROL, lambda done: bar.update(task, completed=done)
            )
    print(tables(tally, (time.monotonic() - began) / 60))
    for line in tally.failures[:20]:
        print(f"\n{line}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
