"""python -m launchers.preflight --phase PHASE: print the checklist; 78 where something must be mended first."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from encdec.command_line import Help, Parser, exit_code_of
from encdec.errors import ConfigError, ExitCode
from launchers.arguments import add_size, add_what, check
from launchers.chain import asked
from launchers.cluster_file import read_cluster_file
from launchers.preflight import Check, checklist, failed, lines
from launchers.views import show


def main(argv: list[str] | None = None) -> int:
    """0, or 78 where a check fails."""
    show.make_printable()
    return exit_code_of(lambda: tell(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m launchers.preflight",
        description="The checklist before a long run: text, weights, memory, disk, checkpoint, trackers.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    what = add_what(parser)
    what.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="a step-<k> folder to go on from")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--cluster", default="auto", metavar="NAME", help="configs/clusters/NAME.yaml, for its gpu_memory_gb"
    )
    where.add_argument(
        "--gpu-memory-gb", type=float, help="memory of one GPU (default: the cluster's, or nvidia-smi's)"
    )
    add_size(where)
    arguments = parser.parse_args(argv)
    check(arguments)
    memory = arguments.gpu_memory_gb
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(
            "--gpu-memory-gb must be a positive number", found=memory, remedy="Give 80 for an A100 of 80 GB"
        )
    return arguments


def tell(arguments: argparse.Namespace) -> int:
    """Print the checklist; of a chain that of its last phase, which needs the most."""
    try:
        link = asked(arguments).links[-1]
    except ConfigError as error:
        checks = [Check("configuration", "fail", f"{error.rule}, found {error.found}", error.remedy)]
    else:
        memory = arguments.gpu_memory_gb or read_cluster_file(arguments.cluster).gpu_memory_gb
        checks = checklist(link.run, link.paths, resume=arguments.resume, gpu_memory_gb=memory)
    for line in lines(checks):
        print(line)
    return ExitCode.CONFIG_WRONG if failed(checks) else ExitCode.COMPLETE


if __name__ == "__main__":
    sys.exit(main())
