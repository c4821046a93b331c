"""SIGKILL of a rank -> next new step: our agent against ``torchrun --max-restarts``, on the same program, in turns.

python -m benchmarks.restart --kills 30
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peers import PEERS, Start, emit, percentile, start, wait_for_step

SETTINGS = (
    "training.num_train_steps=1000000",
    "training.total_tokens=1000000000000",
    "training.save_steps=5",
    "training.eval_samples=0",
)
STEPS_BETWEEN_KILLS = 6


def kill_and_time(run: Start, choose: random.Random) -> float:
    """Seconds from SIGKILL of one rank to the first step beyond all recorded ones."""
    wait_for_step(run, run.newest_step() + STEPS_BETWEEN_KILLS)
    victim = choose.choice(run.ranks())
    killed_at = time.time()
    victim.send_signal(signal.SIGKILL)
    time.sleep(0.2)  # a step that was under way when the kill came is not the next one
    return wait_for_step(run, run.newest_step() + 1)["time"] - killed_at


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills per peer")
    parser.add_argument("--seed", type=int, default=0, help="which rank is killed when")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    choose = random.Random(arguments.seed)
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        for peer in PEERS:  # one at a time: two programs would share the cores
            run = start(peer, Path(folder, peer), Path(folder, "packed"), *SETTINGS)
            try:
                wait_for_step(run, 1)
                for kill in range(arguments.kills):
                    seconds[peer].append(kill_and_time(run, choose))
                    print(f"{peer}: kill {kill + 1}/{arguments.kills}: {seconds[peer][-1]:.2f} s", file=sys.stderr)
            finally:
                run.end()
    p50 = {peer: percentile(seconds[peer], 50) for peer in PEERS}
    result = {
        peer: {"p50_s": round(p50[peer], 3), "p99_s": round(percentile(seconds[peer], 99), 3), "kills": arguments.kills}
        for peer in PEERS
    }
    emit({**result, "torchrun_over_ours_p50": round(p50["torchrun"] / p50["ours"], 2)}, arguments.json)


if __name__ == "__main__":
    main()
