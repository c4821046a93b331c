"""The command lines of ``launchers.submit`` and ``launchers.prepare``."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from encdec.command_line import Help, Parser
from encdec.errors import ConfigError
from encdec.training.execution import StartingPoint, TrainingPhase
from encdec.training.run_config import RunConfig, resolve_run
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
SHARDINGS = {"fsdp2": "fsdp", "zero3": "deepspeed"}
"""--sharding -> ``infra.distributed_type``"""
BUILT_IN_CLUSTERS = ("auto", "slurm", "local")
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
    what = add_what(parser)
    what.add_argument(
        "--resume",
        metavar="auto|never|PATH",
        default="auto",
        help="auto: continue the run of the same configuration; never: make a new one; PATH: begin with a step-<k> "
        "folder of another run, or a run directory's newest one: weights, optimizer, step and place in the data, "
        "without the phases before and recorded as unproved",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--cluster",
        default="auto",
        metavar="NAME",
        help="auto: Slurm if a controller answers, else this machine; slurm; local; NAME: configs/clusters/NAME.yaml; "
        "or the path of such a file",
    )
    add_size(where)
    slurm = parser.add_argument_group("Slurm")
    for flag, (metavar, text) in SBATCH_FLAGS.items():
        slurm.add_argument(f"--{flag}", metavar=metavar, help=text)
    add_continuation(slurm)
    slurm.add_argument(
        "--in-one-allocation",
        action="store_true",
        help="one job for the whole chain, which goes on with the next phase itself (default: a job a phase, queued at "
        "once, each after the one before)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--dry-run", action="store_true", help="print the plan, and for Slurm the batch script; write nothing"
    )
    how.add_argument(
        "--json", action="store_true", help="with --dry-run: print the plans, and the batch scripts, as JSON"
    )
    how.add_argument(
        "--calibrate-from",
        metavar="RUN",
        help="run whose measured speed the forecast rests on: its name in runs/, the beginning of one, CHAIN/PHASE, or "
        "a directory (default: the most similar run of the same model and device that lies beside this one or in "
        "runs/)",
    )
    how.add_argument(
        "--preflight",
        action="store_true",
        help="print the checklist of python -m launchers.preflight first, and start nothing where it fails",
    )
    how.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="follow the run to its end and exit with its code (default: here yes, on Slurm no)",
    )
    arguments = parser.parse_args(argv)
    check(arguments)
    check_flags(arguments)
    arguments.command = shlex.join(["python", "-m", "launchers.submit", *(sys.argv[1:] if argv is None else argv)])
    return arguments


def parse_prepare(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line of ``launchers.prepare``; nothing is read or written.

    Raises:
        ConfigError: an unknown flag, a missing or impossible value.
    """
    parser = Parser(
        prog="python -m launchers.prepare",
        description="Inside a batch job: make or find the run directory of a phase, and the script that runs it there.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_what(parser)
    where = parser.add_argument_group("where")
    where.add_argument(
        "--cluster",
        default="slurm",
        metavar="NAME",
        help="configs/clusters/NAME.yaml, or the path of such a file, for all but the flags of sbatch",
    )
    add_size(where)
    add_continuation(parser.add_argument_group("Slurm"))
    arguments = parser.parse_args(argv)
    check(arguments)
    return arguments


def asked_run(
    arguments: argparse.Namespace, phase: TrainingPhase, starts_from: StartingPoint | None, name: str | None
) -> RunConfig:
    """The run of one phase that a parsed command line asks for.

    Raises:
        ConfigError: any rule of the configuration broken.
    """
    flags = [f"infra.distributed_type={SHARDINGS[arguments.sharding]}"] if arguments.sharding else []
    if arguments.per_device_batch is not None:
        flags.append(f"training.per_device_train_batch_size={arguments.per_device_batch}")
    return resolve_run(
        phase,
        config_file=arguments.config,
        settings=[*arguments.set, *flags],
        nodes=arguments.nodes,
        ranks_per_node=arguments.gpus_per_node,
        name=name,
        starts_from=starts_from,
    )


def add_what(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags that say which run."""
    what = parser.add_argument_group("what")
    what.add_argument("--phase", required=True, choices=[str(phase) for phase in TrainingPhase], help="phase to run")
    what.add_argument(
        "--through",
        choices=[str(phase) for phase in TrainingPhase],
        help="last phase of a chain that begins with --phase: each starts from the weights with which the one before "
        "it passed its gate (default: --phase alone). Earlier phases that have not passed theirs are run first",
    )
    what.add_argument(
        "--from-weights",
        metavar="PATH|HUB_ID",
        help="start from these weights, without the phases before and recorded as unproved: a checkpoint, a run "
        "directory, a model directory or a hub id",
    )
    what.add_argument("--config", type=Path, default=Path("configs/training_config.yaml"), help="YAML file")
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="lay one value over the file; repeatable",
    )
    what.add_argument(
        "--sharding",
        choices=list(SHARDINGS),
        help="engine that shards the model: torch's FSDP2 or DeepSpeed's ZeRO-3 (default: infra.distributed_type)",
    )
    what.add_argument(
        "--per-device-batch",
        metavar="N|auto",
        help="most samples of a micro-batch on one rank; auto: as many as fit its memory, found at the start; the "
        "global batch stays what it is (default: training.per_device_train_batch_size)",
    )
    what.add_argument(
        "--env-secret",
        action="append",
        default=[],
        metavar="NAME",
        help="variable of this shell that the job must have, such as WANDB_API_KEY: its value is handed on and written "
        "nowhere; repeatable",
    )
    what.add_argument("--name", help="name of the run (default: phase + digest of the configuration)")
    what.add_argument(
        "--run-dir", type=Path, help="run directory, on storage that all nodes share (default: runs/NAME)"
    )
    return what


def add_size(where: argparse._ArgumentGroup) -> None:
    """Flags that say on how many ranks."""
    where.add_argument("--nodes", type=int, default=1, help="nodes")
    where.add_argument("--gpus-per-node", type=int, help="ranks per node, one a GPU (default: infra.num_gpus)")
    where.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="torchrun",
        help="what starts the ranks of a node: torchrun's elastic agent, or accelerate launch; the run is the same",
    )


def add_continuation(slurm: argparse._ArgumentGroup) -> None:
    """Flags that say what follows a job."""
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


def check(arguments: argparse.Namespace) -> None:
    """What both commands have in common."""
    for flag in ("--nodes", "--gpus-per-node", "--max-attempts"):
        value = getattr(arguments, flag.removeprefix("--").replace("-", "_"), None)
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1", found=value, remedy=f"Give {flag} a positive number")
    batch = arguments.per_device_batch
    if batch is not None and not re.fullmatch(r"auto|[1-9]\d*", batch):
        raise ConfigError(
            "--per-device-batch must be a number of samples or auto",
            found=repr(batch),
            remedy="Give 1 or more, or auto",
        )
    if arguments.name is not None and not SAFE_NAME.fullmatch(arguments.name):
        raise ConfigError(
            "--name must be letters, digits, '.', '_' and '-', at most 128 of them, starting with a letter or digit",
            found=repr(arguments.name),
            remedy="Use --run-dir for a directory with other characters",
        )


def check_flags(arguments: argparse.Namespace) -> None:
    """Gather Slurm's flags as ``arguments.sbatch``, by long name. They ask for Slurm."""
    if arguments.json and not arguments.dry_run:
        raise ConfigError("--json goes with --dry-run", found="--json alone", remedy="Add --dry-run, or leave it out")
    values = {flag: getattr(arguments, flag.replace("-", "_")) for flag in SBATCH_FLAGS}
    arguments.sbatch = {flag: value for flag, value in values.items() if value is not None}
    for flag, value in arguments.sbatch.items():
        if not (value and value.isprintable()):
            raise ConfigError(
                f"--{flag} must be one printable line", found=repr(value), remedy="Fill it or leave it out"
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
    if arguments.sbatch and arguments.cluster == "local":
        raise ConfigError(
            "Slurm's flags are for Slurm",
            found=f"--{next(iter(arguments.sbatch))} with --cluster local",
            remedy="Leave one of the two out",
        )
    if arguments.sbatch and arguments.cluster == "auto":
        arguments.cluster = "slurm"
