"""Command -> first step done, two ranks: ours over torchrun on the same program, in turns.

    python -m benchmarks.startup --rounds 5

The run directory is fresh each time, the packed text is there: both do the same work, and ours also makes the plan, the
run directory with its snapshot of the code, and goes through submitit.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.peers import PEERS, emit, percentile, start, wait_for_step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="starts per peer (default: 5)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        for round_number in range(-1, arguments.rounds):  # the first round packs the text and is not counted
            for peer in PEERS:
                root, packed = Path(folder, f"{peer}-{round_number}"), Path(folder, "packed")
                run = start(peer, root, packed, "training.seed=42", ranks=arguments.ranks)
                try:
                    first = wait_for_step(run, 1)["time"] - run.began
                finally:
                    run.end()
                if round_number >= 0:
                    seconds[peer].append(first)
    p50 = {peer: percentile(seconds[peer], 50) for peer in PEERS}
    result = {peer: {"p50_s": round(p50[peer], 3), "all_s": [round(s, 3) for s in seconds[peer]]} for peer in PEERS}
    emit({**result, "ours_over_torchrun_p50": round(p50["ours"] / p50["torchrun"], 3)}, arguments.json)


if __name__ == "__main__":
    main()
