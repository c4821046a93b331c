"""The rank program, whoever starts it: our agent, torchrun or ``accelerate launch``.

torchrun --nproc-per-node 2 -m encdec.train --config configs/tiny.yaml --output_dir output
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from encdec.errors import EncdecError, ExitCode
from encdec.files import RunPaths
from encdec.training.execution import TrainingPhase
from encdec.training.rank import run_rank, run_rank_of_attempt, start_log
from encdec.training.run_config import RunConfig, require_same_run, resolve_run
from encdec.training.sharding import require_ranks
from encdec.training.yaml_values import read_yaml

__all__ = ["main", "run_rank_of_attempt"]
EXIT_CODES = {"complete": ExitCode.COMPLETE, "gate": ExitCode.GATE_NOT_PASSED}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
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
    arguments = parse(argv)
    start_log()
    try:
        output_dir = arguments.output_dir or read_yaml(arguments.config).get("infra", {}).get("output_dir", "output")
        paths = RunPaths(Path(output_dir).absolute())
        run = open_run(arguments, paths)
        outcome = run_rank(run, paths, resume_from=arguments.resume_from)
    except EncdecError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # at once: the other ranks may wait for this one in a collective
    return EXIT_CODES.get(outcome["cause"], ExitCode.CONTINUE_ME)


def open_run(arguments: argparse.Namespace, paths: RunPaths) -> RunConfig:
    """Resolve the run; rank 0 writes run.yaml, or refuses a directory that belongs to another run."""
    world, local_world = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    phase = TrainingPhase(arguments.phase) if arguments.phase else None
    run = resolve_run(phase, config_file=arguments.config, settings=arguments.set, nodes=max(1, world // local_world))
    require_ranks(run.config.infra)
    if int(os.environ.get("RANK", 0)) == 0:
        if paths.run_yaml.is_file():
            require_same_run(paths, run)
            ask_to_continue(arguments, paths)
        else:
            paths.make()
            run.write(paths.run_yaml)
    return run


def ask_to_continue(arguments: argparse.Namespace, paths: RunPaths) -> None:
    """At a terminal, ask before continuing what is there; a no ends here, since one directory is one run."""
    if arguments.auto_resume or arguments.resume_from or not sys.stdin.isatty():
        return
    if input(f"{paths.root} holds a run of this configuration. Continue it? [Y/n] ").strip().lower() in ("n", "no"):
        sys.exit("give another --output_dir for a new run")


if __name__ == "__main__":
    sys.exit(main())
