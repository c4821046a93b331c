"""python -m tests.encdec.checkpoints.peak_memory RUN OUT: how far memory rose, bytes, in an average and an export.

``everything`` is the control: it does what the others must not, and holds all that it reads.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from encdec.checkpoints.averaging import average, choose_sources
from encdec.checkpoints.commands.export import find
from encdec.checkpoints.export import export
from encdec.checkpoints.payload import open_weights
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM

assert Qwen3ForSeq2SeqLM  # imported by an export: not while it is measured
SECONDS_BETWEEN_LOOKS = 0.001


def growth(work: Callable[[], object]) -> int:
    """Highest resident memory during ``work`` above that before it."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before and kept would hide as much of the growth
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = work()
    peak = max(peak, process.memory_info().rss)
    done.set()
    watcher.join()
    del kept
    return peak - before


def main(run: Path, out: Path) -> None:
    sources, _ = choose_sources(run / "checkpoints", last=5)
    small, _ = choose_sources(run.parent / "small" / "checkpoints", last=2)
    average(small, out / "warm-up")  # imports and first uses
    folder, manifest = find(run, best=False)
    weights = [open_weights(source.folder, source.manifest) for source in sources]
    measured = {
        "average": growth(lambda: average(sources, out / "mean")),
        "export": growth(lambda: export(folder, manifest, out / "hf", shard_mb=8)),
        "everything": growth(lambda: [one.read(name) for one in weights for name in one.tensors]),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
