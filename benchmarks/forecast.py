"""What a plan foresees over what the run then took, here on processors: memory of a rank, hours of the whole run.

    python -m benchmarks.forecast

A first run calibrates: its steps, start, pauses and end are measured. A second one of the same model, longer, with
other intervals and another seed, is planned, run, and compared with its plan. Memory is the largest resident set of
either rank (VmHWM of proc(5)), looked at until they end; a run's hours go from its process to its outcome. Where other
work comes and goes on the machine, steps take another time than when it was calibrated: that drift is printed, too, and
what the same plan says once it rests on the run's own records.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import REPOSITORY, emit, is_rank
from encdec.files import RunPaths
from encdec.records import Outcome, ProcessRecord, read_record

CONFIG = REPOSITORY / "configs" / "tiny.yaml"
MODEL = (
    "model.from_scratch.hidden_size=192", "model.from_scratch.intermediate_size=576", "model.from_scratch.head_dim=48",
    "model.from_scratch.num_hidden_layers=3", "model.train_tokenizer_vocab_size=6144", "data.max_seq_length=160",
    "data.max_encoder_length=192", "data.max_decoder_length=192",
)  # fmt: skip
"""Over configs/tiny.yaml: large enough that the model, not Python, is a good part of a rank's memory."""
SECONDS_BETWEEN_LOOKS = 0.1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of the run that calibrates (default: 20)")
    parser.add_argument("--longer", type=float, default=2.5, help="the second run's steps over its (default: 2.5)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root, steps = Path(folder), arguments.steps
        first = settings(root, steps=steps, save=steps // 2, evaluate=steps // 2, seed=1)
        peak_of_run(root / "calibration", first)
        longer = round(arguments.longer * steps)
        second = settings(root, steps=longer, save=longer // 3, evaluate=longer // 5, seed=2)
        plan = dry_run(root / "foreseen", second)
        peak_gb = peak_of_run(root / "foreseen", second)
        hours = hours_of(RunPaths(root / "foreseen"))
        again = dry_run(root / "foreseen", [*second, "--calibrate-from", str(root / "foreseen")])["forecast"]
    forecast = plan["forecast"]
    emit(
        {
            "basis": forecast["basis"],
            "memory_gb": {"foreseen": round(forecast["memory_gb"]["total_gb"], 3), "measured": round(peak_gb, 3)},
            "of_it_without_a_model_gb": forecast["memory_gb"]["process_gb"],
            "seconds": {"foreseen": round(3600 * forecast["wall_hours"], 1), "measured": round(3600 * hours, 1)},
            "memory_foreseen_over_measured": round(forecast["memory_gb"]["total_gb"] / peak_gb, 3),
            "hours_foreseen_over_measured": round(forecast["wall_hours"] / hours, 3),
            "step_when_calibrated_over_step_then": round(forecast["step_seconds"] / again["step_seconds"], 3),
            "hours_by_its_own_records_over_measured": round(again["wall_hours"] / hours, 3),
        },
        arguments.json,
    )


def settings(root: Path, *, steps: int, save: int, evaluate: int, seed: int) -> list[str]:
    """Flags of launchers.submit for one run."""
    values = (
        *MODEL, f"data.packed_dir={root / 'packed'}", f"training.seed={seed}", f"training.num_train_steps={steps}",
        f"training.save_steps={save}", f"training.eval_steps={evaluate}", "training.total_tokens=100000000",
    )  # fmt: skip
    flags = ["--phase", "sanity_check", "--cluster", "local", "--config", str(CONFIG)]
    return [*flags, *(word for value in values for word in ("--set", value))]


def submit(run_dir: Path, flags: list[str], *more: str) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "launchers.submit", "--run-dir", str(run_dir), *flags, *more]


def dry_run(run_dir: Path, flags: list[str]) -> dict[str, Any]:
    """The plan, as --dry-run --json prints it."""
    done = subprocess.run(submit(run_dir, flags, "--dry-run", "--json"), cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)[0]


def peak_of_run(run_dir: Path, flags: list[str]) -> float:
    """Run to the end; returns the largest resident set of a rank meanwhile, GB of 10**9 bytes."""
    process = subprocess.Popen(
        submit(run_dir, flags), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    paths, peak = RunPaths(run_dir), 0.0
    while process.poll() is None:
        peak = max([peak, *map(high_water_gb, ranks_of(paths))])
        time.sleep(SECONDS_BETWEEN_LOOKS)
    output, _ = process.communicate()
    # the bound of the phase is not what is measured here: a run that trained to its end has said all that is asked
    if read_record(paths.attempt(0).outcome, Outcome).cause not in ("complete", "gate"):
        raise SystemExit(output)
    return peak


def ranks_of(paths: RunPaths) -> list[psutil.Process]:
    """The rank processes of the run's first attempt, as far as they live."""
    with contextlib.suppress(Exception):
        agent = psutil.Process(read_record(paths.attempt(0).process, ProcessRecord).pid)
        return [child for child in agent.children(recursive=True) if is_rank(child)]
    return []


def high_water_gb(process: psutil.Process) -> float:
    """VmHWM of a process, GB; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    return 0.0


def hours_of(paths: RunPaths) -> float:
    """From the attempt's process to its outcome."""
    attempt = paths.attempt(0)
    began, ended = read_record(attempt.process, ProcessRecord).created, read_record(attempt.outcome, Outcome).time
    return (ended - began) / 3600


if __name__ == "__main__":
    main()
