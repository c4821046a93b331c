"""Proof over kills: runs of two sharded ranks, killed at drawn places, lose no checkpoint and end as one that was not.

    python -m benchmarks.kills --kills 500

The ranks are the real rank program on the micro model of the tests: gloo, FSDP2 or ZeRO-3, an evaluation after every
step, a checkpoint every 4 of 60 steps, in three of four runs beside training. SIGKILL strikes one rank, all ranks, or
these and their agent, at one of the places below or some milliseconds after it; checkpoints that are damaged on purpose
are part of the draw. After each kill every committed checkpoint must verify and hold the twin's state, and the next
start must go on after the newest one. Runs follow one another until all kills are done; each must end with the twin's
digest, losses, evaluations, verdict and state. Exits 1 if one thing differs. Ctrl-C ends it with what has been counted.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import kill_points as at
from benchmarks.kill_points import Kill
from benchmarks.killed_run import Figures, KilledRun
from benchmarks.peers import markdown
from benchmarks.small_agent import RANKS, BrokenChainError
from benchmarks.undisturbed import Twin, make_run, make_twin
from launchers.arguments import SHARDINGS

# place -> (weight, the last operation of it that is aimed at)
DRAWN: dict[str, tuple[int, int]] = {
    at.COPY: (10, 4),
    at.SHARD: (12, 20),
    at.BETWEEN: (10, 30),
    at.MANIFEST: (8, 6),
    at.BEFORE: (8, 4),
    at.AFTER: (8, 4),
    at.REPLACE: (8, 6),
    at.PRUNE: (8, 30),
    at.QUARANTINE: (6, 4),
    at.CLEAR: (4, 6),
    at.READ: (8, 10),
    at.AVERAGE: (6, 60),
    at.ANY: (6, 160),
    at.MOMENT: (10, 1),
}
OVERDUE = (150, 250)
"""Operations, from and to, after which a victim dies that has not come to its place; a save has about 40."""
LONGEST_DELAY_SECONDS = 0.01
SHARE_OF_DELAYED = 0.4


def draw(random_: random.Random, seconds_of_a_run: float) -> Kill:
    """One kill; MOMENT within the time that half a run takes."""
    place = random_.choices(list(DRAWN), [weight for weight, _ in DRAWN.values()])[0]
    delayed = random_.random() < SHARE_OF_DELAYED
    delay = random_.uniform(1e-4, LONGEST_DELAY_SECONDS) if delayed else 0.0
    return Kill(
        place=place,
        scope=random_.choice(at.SCOPES),
        victim=random_.randrange(RANKS) if place in at.SHARED else 0,
        nth=random_.randint(1, DRAWN[place][1]),
        delay=random_.uniform(0, seconds_of_a_run / 2) if place == at.MOMENT else delay,
        overdue=10**6 if place == at.AVERAGE else random_.randint(*OVERDUE),  # its place comes at the end alone
    )


def kill_runs(
    folder: Path,
    packed: Path,
    twin: Twin,
    kills: int,
    random_: random.Random,
    tell: Callable[[Figures], None],
    *settings: str,
) -> Figures:
    """Runs one after another until ``kills`` are done, the last one to its end; stops at the first failure.

    Args:
        folder: takes the run directories; those that ended as they should are deleted.
        tell: called after every start.
        settings: KEY=VALUE, as ``twin`` was made with.
    """
    figures = Figures()
    while figures.killed < kills and not figures.failures:
        how = f"training.async_save={'false' if figures.runs % 4 == 3 else 'true'}"
        paths = make_run(folder / f"run-{figures.runs}", packed, how, *settings, like=twin.paths)
        run = KilledRun(paths, twin, figures)
        try:
            while not run.complete and not figures.failures:
                run.go_on(draw(random_, twin.seconds) if figures.killed < kills else None)
                tell(figures)
        except BrokenChainError as error:
            figures.broken.append(str(error))
        except KeyboardInterrupt:
            return figures
        finally:
            run.close()
        if not figures.failures:
            shutil.rmtree(paths.root)
    return figures


def tables(figures: Figures, minutes: float) -> str:
    """What was counted, as RESULTS.md holds it."""
    kills = [
        [place, *(str(figures.kills[place, scope]) for scope in at.SCOPES), str(figures.recomputed[place])]
        for place in at.PLACES
    ]
    sums = [str(sum(figures.kills[place, scope] for place in at.PLACES)) for scope in at.SCOPES]
    kills.append(["all", *sums, str(figures.recomputed.total())])
    facts = [
        ["kills", str(figures.killed)],
        ["runs, each ended as its twin", f"{figures.runs - len(figures.differences)} of {figures.runs}"],
        ["checkpoints read after a kill", str(figures.checked)],
        ["checkpoints lost", str(len(figures.lost))],
        ["broken chains", str(len(figures.broken))],
        ["false alarms", str(len(figures.alarms))],
        ["damaged on purpose and moved away", str(figures.quarantined)],
        ["steps computed, again", f"{figures.steps:,}, {figures.recomputed.total():,}"],
        ["minutes", f"{minutes:.0f}"],
    ]
    header = ["killed when", *at.SCOPES, "steps computed again"]
    return f"{markdown(header, kills)}\n\n{markdown(['', ''], facts)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="kills in all (default: 500)")
    parser.add_argument("--sharding", choices=SHARDINGS, default="fsdp2", help="engine (default: fsdp2)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave a run that failed there")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    columns = (TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as temporary, Progress(*columns, console=Console(stderr=True)) as bar:
        folder = arguments.keep or Path(temporary)
        task = bar.add_task("", total=arguments.kills)
        engine = f"infra.distributed_type={SHARDINGS[arguments.sharding]}"
        twin = make_twin(folder, folder / "packed", engine)
        figures = kill_runs(
            folder, folder / "packed", twin, arguments.kills, random.Random(arguments.seed),
            lambda figures: bar.update(task, completed=figures.killed), engine,
        )  # fmt: skip
    print(tables(figures, (time.monotonic() - began) / 60))
    for line in figures.failures:
        print(f"\n{line}")
    return 1 if figures.failures or figures.killed < arguments.kills else 0


if __name__ == "__main__":
    sys.exit(main())
