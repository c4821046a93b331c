"""The 1 B model on one GPU: correctness first, then tokens/s, MFU, memory, torch.compile on and off.

    python -m benchmarks.gpu                                  one H100 or H200: about 8 minutes
    python -m benchmarks.gpu --size small --no-compile        the same on whatever is here, a CPU too
    python -m benchmarks.gpu.memory                           beside it: the plan's memory over the allocator's count

Target: MFU of 50 % at least, and more than 10,000 tokens/s. Figures go to standard output as they are found, and whole
to --json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from benchmarks.gpu import correctness, speed
from benchmarks.model import device_name
from benchmarks.model_peers import SHAPES
from benchmarks.peers import emit

TARGET_MFU, TARGET_TOKENS_PER_SECOND = 0.5, 10_000
LENGTHS = {"small": [(128, 2)], "1B": [(1024, 16), (4096, 4)]}
"""Limit of the encoder's tokens, and samples of a batch."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="1B", help="shape whose speed is measured (default: 1B)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each case (default: 10)")
    parser.add_argument("--json", type=Path, help="write all figures to this file, too")
    parser.add_argument("--no-compile", action="store_true", help="leave out what takes torch.compile")
    parser.add_argument("--no-speed", action="store_true", help="correctness alone")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error("--steps must be 1 or more")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where a check does not hold, or 2 where a target is missed."""
    arguments = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "device": device_name(device), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    try:
        result["correctness"] = correctness.check_all(device, compiled=not arguments.no_compile)
    except AssertionError as error:
        print(f"does not hold: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2), flush=True)
    if arguments.no_speed:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device != "cpu" else "gloo", init_method=f"file://{folder}/rendezvous", rank=0,
            world_size=1,
        )  # fmt: skip
        for tokens, batch in LENGTHS[arguments.size]:
            found = speed.measure(
                arguments.size, tokens, batch, arguments.steps, device, compiled=not arguments.no_compile
            )
            print(json.dumps(found, indent=2), flush=True)
            result[f"speed, {tokens} encoder tokens"] = found
            if arguments.json:  # what is measured so far stays, whatever comes
                arguments.json.write_text(json.dumps(result, indent=2) + "\n")
        dist.destroy_process_group()
    best = best_of(result)
    result["best"] = best
    emit(result, arguments.json)
    met = best["mfu"] >= TARGET_MFU and best["tokens_per_s"] > TARGET_TOKENS_PER_SECOND
    print(f"target (MFU {TARGET_MFU}, {TARGET_TOKENS_PER_SECOND:,} tokens/s): {'met' if met else 'missed'}")
    return 0 if met or device == "cpu" else 2


def best_of(result: dict[str, Any]) -> dict[str, Any]:
    """The case with the highest MFU."""
    measured = [
        {"lengths": lengths, "case": case, **figures}
        for lengths, found in result.items()
        if lengths.startswith("speed")
        for case, figures in found.items()
        if isinstance(figures, dict)
    ]
    return max(measured, key=lambda figures: figures["mfu"])


if __name__ == "__main__":
    sys.exit(main())
