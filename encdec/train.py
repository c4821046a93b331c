"""The rank program, whoever starts it: our agent, torchrun or ``accelerate launch``.

torchrun --nproc-per-node 2 -m encdec.train --config configs/tiny.yaml --output_dir output
"""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from encdec.command_line import INTERRUPTED, Parser
from encdec.errors import EncdecError, ExitCode, RunDirectoryError
from encdec.files import RunPaths
from encdec.training.execution import TrainingPhase
from encdec.training.rank import run_rank, run_rank_of_attempt, start_log
from encdec.training.run_config import RunConfig, require_same_run, resolve_run
from encdec.training.sharding import require_ranks

__all__ = ["main", "run_rank_of_attempt"]
EXIT_CODES = {"complete": ExitCode.COMPLETE, "gate": ExitCode.GATE_NOT_PASSED}
SECONDS_FOR_THE_FIRST_RANK = 5.0
"""How long the other ranks of a node leave it to the first one to say what is wrong."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="encdec.train",
        description="Train as one rank. Start it with torchrun or accelerate launch.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="lay one value over the file; repeatable",
    )
    parser.add_argument(
        "--phase",
        choices=[str(phase) for phase in TrainingPhase],
        help="train this phase (default: as the training section says)",
    )
    parser.add_argument("--output_dir", type=Path, help="run directory (default: infra.output_dir)")
    parser.add_argument(
        "--resume_from", type=Path, help="a step-<k> folder (default: the newest valid one in output_dir)"
    )
    parser.add_argument("--auto-resume", action="store_true", help="at a terminal, continue without asking")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode."""
    try:
        arguments = parse(argv)
        run = resolve(arguments)
        paths = RunPaths(Path(arguments.output_dir or run.config.infra.output_dir).absolute())
        if int(os.environ.get("RANK", 0)) == 0:
            open_directory(arguments, paths, run)
        start_log()
        outcome = run_rank(run, paths, resume_from=arguments.resume_from)
    except EncdecError as error:
        end(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        end("interrupted", INTERRUPTED)
    return EXIT_CODES.get(outcome["cause"], ExitCode.CONTINUE_ME)


def resolve(arguments: argparse.Namespace) -> RunConfig:
    """The run that file, flags and the launcher's environment describe; the same on every rank."""
    world, local_world = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    phase = TrainingPhase(arguments.phase) if arguments.phase else None
    run = resolve_run(phase, config_file=arguments.config, settings=arguments.set, nodes=max(1, world // local_world))
    require_ranks(run.config.infra)
    return run


def open_directory(arguments: argparse.Namespace, paths: RunPaths, run: RunConfig) -> None:
    """Write run.yaml, or refuse a directory that belongs to another run."""
    if os.path.lexists(paths.run_yaml):
        require_same_run(paths, run)
        ask_to_continue(arguments, paths)
    try:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            paths.stop_request.unlink(missing_ok=True)  # a request of last time must not stop this start
        paths.make()
        if not os.path.lexists(paths.run_yaml):
            run.write(paths.run_yaml)
    except OSError as error:
        raise RunDirectoryError(
            "The run directory must be writable",
            found=f"{paths.root} ({error.strerror})",
            remedy="Choose another with --output_dir, or free or open the folder above it",
        ) from None


def ask_to_continue(arguments: argparse.Namespace, paths: RunPaths) -> None:
    """At a terminal, ask before continuing what is there.

    Raises:
        RunDirectoryError: the answer is no, or the terminal's end: one directory is one run.
    """
    if arguments.auto_resume or arguments.resume_from or sys.stdin is None or not sys.stdin.isatty():
        return
    try:
        answer = input(f"{paths.root} holds a run of this configuration. Continue it? [Y/n] ").strip().lower()
    except EOFError:
        answer = "no"
    if answer in ("n", "no"):
        raise RunDirectoryError(
            "A run directory holds one run",
            found=f"one in {paths.root} that is not to be continued",
            remedy="Give another --output_dir for a new run",
        )


def end(message: str, exit_code: int) -> NoReturn:
    """Say why, and end at once: the other ranks may wait for this one in a collective.

    What is wrong with a run mostly stops all of its ranks. The first rank of a node says it, and the launcher then
    ends the others; one that is still there had a reason of its own.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's end, not a request to save
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
    if sys.stderr is not None:
        print(message, file=sys.stderr, flush=True)
    os._exit(exit_code)


def leave(exit_code: int) -> NoReturn:
    """End without taking the interpreter apart: a thread of torch's that is still there then aborts the process, after
    all work is done (seen once in some fifty ends).
    """
    atexit._run_exitfuncs()  # data workers end, trackers flush
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    leave(main())
