"""Trains a model for some steps, judges it as the validation phase is judged, and keeps it if it passed.

python -m encdec.validation_run --model-path DIR --dataset FILE --num-steps 1000 --output-dir validation

Writes ``validation_results.json`` (``summary``, ``validation``, ``gate``) and, once passed, ``model/`` for
``from_pretrained``. Alone in one process, or as the ranks of torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from encdec.checkpoints.export import export
from encdec.checkpoints.manifest import verify
from encdec.command_line import Help, Parser, exit_code_of
from encdec.errors import ExitCode
from encdec.files import RunPaths, atomic_write_json
from encdec.records import read_steps
from encdec.train import EXIT_CODES, judge_end, leave
from encdec.training.execution import PHASE_CONFIGS, TrainingPhase
from encdec.training.monitor import TrainingMonitor
from encdec.training.promotion import GateFile, read_gate
from encdec.training.rank import run_rank, start_log
from encdec.training.run_config import RunConfig, make_run_directory, require_same_run, resolve_run

RESULTS = "validation_results.json"
MODEL = "model"


def parse(argv: list[str] | None) -> argparse.Namespace:
    steps = PHASE_CONFIGS[TrainingPhase.VALIDATION].num_train_steps
    parser = Parser(
        prog="python -m encdec.validation_run",
        description="Train a model for some steps and judge it as the validation phase is judged.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model-path",
        help="model to validate: an encoder-decoder's or a Qwen3's directory or hub id (default: the configuration's)",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("validation"), help="run directory, results, model")
    parser.add_argument("--dataset", help="hub data set, local file or folder (default: data.dataset_name)")
    parser.add_argument("--num-steps", type=int, help=f"optimizer steps (default: the phase's, {steps} in the table)")
    parser.add_argument("--config", type=Path, default=Path("configs/training_config.yaml"), help="YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="lay one value over it; repeatable"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode: 0 passed, 3 not passed."""
    return exit_code_of(lambda: validate(parse(argv)))


def validate(arguments: argparse.Namespace) -> int:
    run = asked_run(arguments)
    paths = RunPaths(arguments.output_dir.absolute())
    first = os.environ.get("RANK", "0") == "0"
    if first:
        if paths.run_yaml.exists():
            require_same_run(paths, run)
        make_run_directory(paths, run)
    start_log()
    outcome = run_rank(run, paths, judge_end=judge_end)
    if not first:
        return EXIT_CODES.get(outcome["cause"], ExitCode.CONTINUE_ME)
    gate = read_gate(paths, TrainingPhase.VALIDATION)
    if gate is None:
        print(f"{outcome['message']}: the same command goes on", file=sys.stderr)
        return ExitCode.CONTINUE_ME
    results = results_of(run, paths, gate)
    atomic_write_json(paths.root / RESULTS, results)
    passed = gate.passed and results["validation"]["passed"]
    if passed:
        keep_model(paths, gate)
    print_results(results, paths.root)
    return ExitCode.COMPLETE if passed else ExitCode.GATE_NOT_PASSED


def asked_run(arguments: argparse.Namespace) -> RunConfig:
    """The validation phase of the configuration, with what the flags say laid over it."""
    given = {
        "data.dataset_name": arguments.dataset,
        "training.num_train_steps": arguments.num_steps,
        "model.model_name_or_path": arguments.model_path,
    }
    settings = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    if arguments.model_path:  # its own sizes and tokenizer, not those of a model from scratch
        settings += ["model.from_scratch=null", "model.train_tokenizer_vocab_size=null"]
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return resolve_run(
        TrainingPhase.VALIDATION,
        config_file=arguments.config,
        settings=[*arguments.set, *settings],
        nodes=max(1, world // local),
        ranks_per_node=local,
    )


def results_of(run: RunConfig, paths: RunPaths, gate: GateFile) -> dict[str, Any]:
    """``summary`` and ``validation`` of the monitor, from the records of all attempts, and the gate's own evidence."""
    assert run.phase is not None
    monitor = TrainingMonitor()
    records = {record["step"]: record for n in paths.attempt_numbers() for record in read_steps(paths.attempt(n).steps)}
    for step in sorted(records):
        record = records[step]
        monitor.update(
            step, record["loss"], record["grad_norm"], record["learning_rate"], record["tokens_per_second"],
            step <= run.warmup_steps,
        )  # fmt: skip
    return {
        "summary": monitor.get_summary(),
        "validation": monitor.validate_phase(run.phase),
        "gate": {"passed": gate.passed, "evidence": [item.to_json() for item in gate.evidence]},
        "steps": run.num_train_steps,
        "checkpoint": gate.checkpoint,
    }


def keep_model(paths: RunPaths, gate: GateFile) -> None:
    """The judged weights with their tokenizer, for ``from_pretrained``, beside what ``model/`` holds already; at every
    call anew, for one that was cut off leaves a part.
    """
    checkpoint = paths.checkpoints / str(gate.checkpoint)
    kept = paths.root / f"{MODEL}.tmp"
    shutil.rmtree(kept, ignore_errors=True)  # of a start that was cut off
    export(checkpoint, verify(checkpoint), kept, files_from=paths.model)
    for file in kept.iterdir():
        os.replace(file, paths.model / file.name)
    kept.rmdir()


def print_results(results: dict[str, Any], root: Path) -> None:
    """One line a check."""
    table = Table("check", "passed", "found", box=None, pad_edge=False, header_style="bold")
    for check in results["validation"]["checks"]:
        table.add_row(check["name"], "yes" if check["passed"] else "NO", check["message"])
    for item in results["gate"]["evidence"]:
        found = "nobody measured it" if item["value"] is None else f"{item['value']:.4g}"
        bound = f"must be {item['comparison']} {item['threshold']:g}"
        table.add_row(
            f"gate {item['gate']}", "yes" if item["passed"] else "NO", f"{found}, {bound}: {item['measured']}"
        )
    Console().print(table)
    print(f"results: {root / RESULTS}")


if __name__ == "__main__":
    leave(main())
