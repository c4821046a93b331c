"""The rank program, whoever starts it: our agent, torchrun or ``accelerate launch``.

torchrun --nproc-per-node 2 -m encdec.train --config configs/tiny.yaml --output_dir output

The launcher gives it an attempt that it has claimed instead: ``--run_dir RUN --attempt 0 --agent 4711``.
"""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from encdec.command_line import INTERRUPTED, Parser
from encdec.errors import EncdecError, ExitCode, RunDirectoryError
from encdec.files import RunPaths
from encdec.gates import GateReport
from encdec.training import lifeline, rank
from encdec.training.execution import TrainingPhase
from encdec.training.rank import run_rank, start_log
from encdec.training.run_config import RunConfig, make_run_directory, require_same_run, resolve_run
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
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="YAML file")
    what.add_argument("--run_dir", type=Path, help="instead: run directory of the launcher, which gives --attempt too")
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
        "--resume_from", "--resume", type=Path, metavar="CHECKPOINT",
        help="a step-<k> folder (default: the newest valid one in output_dir)",
    )  # fmt: skip
    parser.add_argument("--auto-resume", action="store_true", help="at a terminal, continue without asking")
    claimed = parser.add_argument_group("with --run_dir, and nothing else")
    claimed.add_argument("--attempt", type=int, metavar="N", help="its attempt, claimed already")
    claimed.add_argument("--agent", type=int, metavar="PID", help="the process that started this one; die with it")
    arguments = parser.parse_args(argv)
    if (arguments.run_dir is None) != (arguments.attempt is None):
        parser.error("--run_dir and --attempt go together")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode."""
    try:
        arguments = parse(argv)
        if arguments.attempt is not None:
            run_claimed(arguments)
        run = resolve(arguments)
        paths = RunPaths(Path(arguments.output_dir or run.config.infra.output_dir).absolute())
        if int(os.environ.get("RANK", 0)) == 0:
            open_directory(arguments, paths, run)
        start_log()
        outcome = run_rank(run, paths, resume_from=arguments.resume_from, judge_end=judge_end)
    except EncdecError as error:
        end(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        end("interrupted", INTERRUPTED)
    return EXIT_CODES.get(outcome["cause"], ExitCode.CONTINUE_ME)


def run_claimed(arguments: argparse.Namespace) -> NoReturn:
    """One rank of a claimed attempt. How it ended is in result.json: to a launcher any other code than 0 is a crash.

    It ends at once, as a forked rank does: Python drops its signal handlers a second before it has ended, and a warning
    that the agent sends once more would kill it then.
    """
    if arguments.agent is not None:
        lifeline.die_with_parent(arguments.agent)
        lifeline.listen_to_agent(arguments.agent)
    run_rank_of_attempt(str(arguments.run_dir), arguments.attempt)
    leave(ExitCode.COMPLETE)


def run_rank_of_attempt(run_dir: str, attempt: int) -> None:
    """One rank of an attempt that the launcher has claimed, with all that a phase can be judged by at its end."""
    rank.run_rank_of_attempt(run_dir, attempt, judge_end)


def judge_end(*what: Any) -> GateReport:
    """As ``encdec.pipeline.phase_end.judge_end``, which few phases ask for and which takes its time to load."""
    from encdec.pipeline import phase_end

    return phase_end.judge_end(*what)


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
    make_run_directory(paths, run)


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
