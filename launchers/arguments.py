"""The command line of ``launchers.submit``."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path
from typing import NoReturn

from encdec.errors import ConfigError
from encdec.training.execution import TrainingPhase

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Parser(argparse.ArgumentParser):
    """Argument mistakes end like every other mistake: one paragraph, exit code 78."""

    def error(self, message: str) -> NoReturn:
        remedy = f"See python -m {self.prog.split(' -m ')[-1]} --help"
        value = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if value:
            choices = re.findall(r"[\w-]+", value.group(2))
            near = difflib.get_close_matches(value.group(1), choices, n=1)
            remedy = f"Did you mean {near[0]}? {remedy}" if near else remedy
        raise ConfigError("The command line must be understood", found=message, remedy=remedy)


def parse_submit(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check; nothing is read or written.

    Raises:
        ConfigError: an unknown flag, a missing or impossible value.
    """
    parser = Parser(
        prog="python -m launchers.submit",
        description="Plan, package and run one training phase: here, or on a cluster.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what")
    what.add_argument("--phase", required=True, choices=[str(phase) for phase in TrainingPhase], help="phase to run")
    what.add_argument("--config", type=Path, default=Path("configs/training_config.yaml"), help="YAML file")
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="lay one value over the file; repeatable",
    )
    what.add_argument("--name", help="name of the run (default: phase + digest of the configuration)")
    what.add_argument(
        "--run-dir", type=Path, help="run directory, on storage that all nodes share (default: runs/NAME)"
    )
    what.add_argument(
        "--resume",
        choices=["auto", "never"],
        default="auto",
        help="auto: continue the run of the same configuration; never: make a new one",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--cluster",
        choices=["auto", "slurm", "local"],
        default="auto",
        help="auto: Slurm if a controller answers, else this machine",
    )
    where.add_argument("--nodes", type=int, default=1, help="nodes")
    where.add_argument("--gpus-per-node", type=int, help="ranks per node, one a GPU (default: infra.num_gpus)")
    how = parser.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    how.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="follow the run to its end and exit with its code",
    )
    arguments = parser.parse_args(argv)
    check(arguments)
    return arguments


def check(arguments: argparse.Namespace) -> None:
    for flag, value in (("--nodes", arguments.nodes), ("--gpus-per-node", arguments.gpus_per_node)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1", found=value, remedy=f"Give {flag} a positive number")
    if arguments.name is not None and not SAFE_NAME.fullmatch(arguments.name):
        raise ConfigError(
            "--name must be letters, digits, '.', '_' and '-', at most 128 of them, starting with a letter or digit",
            found=repr(arguments.name),
            remedy="Use --run-dir for a directory with other characters",
        )
