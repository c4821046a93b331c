"""The command line of ``launchers.submit``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from encdec.command_line import Help, Parser
from encdec.errors import ConfigError
from encdec.training.execution import TrainingPhase
from launchers.launch_options import CONTINUE_BY, DEFAULT_MAX_ATTEMPTS, LAUNCHERS

SLURM_TIME = re.compile(r"\d+(:[0-5]?\d){0,2}|\d+-\d{1,2}(:[0-5]?\d){0,2}")
SBATCH_FLAGS = {
    "time": (
        "TIME",
        "time limit of one job: minutes, [hours:]minutes:seconds, or days-hours (default: the partition's)",
    ),
    "partition": ("NAME", "partition"),
    "account": ("NAME", "account"),
    "qos": ("NAME", "quality of service"),
    "constraint": ("FEATURES", "features that every node must have"),
    "reservation": ("NAME", "reservation"),
    "exclude": ("NODES", "nodes that must not be used"),
    "mem": ("SIZE", "memory of each node (default: the partition's)"),
    "cpus-per-task": ("N", "CPUs of each node's one task (default: one a rank and one a data worker)"),
}
"""Passed to sbatch as they are, if given."""
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def parse_submit(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check; nothing is read or written.

    Raises:
        ConfigError: an unknown flag, a missing or impossible value.
    """
    parser = Parser(
        prog="python -m launchers.submit",
        description="Plan, package and run one training phase: here, or on a cluster.",
        formatter_class=Help,
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
    where.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="torchrun",
        help="what starts the ranks of a node: torchrun's elastic agent, or accelerate launch; the run is the same",
    )
    slurm = parser.add_argument_group("Slurm")
    for flag, (metavar, text) in SBATCH_FLAGS.items():
        slurm.add_argument(f"--{flag}", metavar=metavar, help=text)
    slurm.add_argument(
        "--continue-by",
        choices=CONTINUE_BY,
        default="requeue",
        help="at the time limit: the same job again, or a successor that was queued in advance and waits for its end",
    )
    slurm.add_argument(
        "--max-attempts",
        type=int,
        default=DEFAULT_MAX_ATTEMPTS,
        help="attempts of the run after which nothing continues it by itself",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    how.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="follow the run to its end and exit with its code (default: here yes, on Slurm no)",
    )
    arguments = parser.parse_args(argv)
    check(arguments)
    values = {flag: getattr(arguments, flag.replace("-", "_")) for flag in SBATCH_FLAGS}
    arguments.sbatch = {flag: value for flag, value in values.items() if value is not None}
    if arguments.sbatch and arguments.cluster == "local":
        raise ConfigError(
            "Slurm's flags are for Slurm",
            found=f"--{next(iter(arguments.sbatch))} with --cluster local",
            remedy="Leave one of the two out",
        )
    if arguments.sbatch:
        arguments.cluster = "slurm"
    return arguments


def check(arguments: argparse.Namespace) -> None:
    for flag in ("--nodes", "--gpus-per-node", "--max-attempts"):
        value = getattr(arguments, flag.removeprefix("--").replace("-", "_"))
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1", found=value, remedy=f"Give {flag} a positive number")
    if arguments.name is not None and not SAFE_NAME.fullmatch(arguments.name):
        raise ConfigError(
            "--name must be letters, digits, '.', '_' and '-', at most 128 of them, starting with a letter or digit",
            found=repr(arguments.name),
            remedy="Use --run-dir for a directory with other characters",
        )
    if arguments.cpus_per_task is not None and not re.fullmatch(r"[1-9]\d*", arguments.cpus_per_task):
        raise ConfigError(
            "--cpus-per-task must be at least 1",
            found=repr(arguments.cpus_per_task),
            remedy="Give it a positive number",
        )
    if arguments.time is not None and not SLURM_TIME.fullmatch(arguments.time):
        raise ConfigError(
            "--time must be minutes, minutes:seconds, hours:minutes:seconds, days-hours or days-hours:minutes:seconds",
            found=repr(arguments.time),
            remedy="Write 90 for an hour and a half, 2-00 for two days",
        )
