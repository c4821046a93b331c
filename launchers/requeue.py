"""python -m launchers.requeue RUN: have a run on Slurm save and start again, or start at once if it waits."""

from __future__ import annotations

import argparse
import sys

from encdec.command_line import Help, Parser, exit_code_of
from launchers.chain_file import label
from launchers.control import requeue
from launchers.names import add_run, find_run
from launchers.views import show
from launchers.views.overview import look
from launchers.views.progress import make_console


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m launchers.requeue",
        description="Have a run on Slurm save and start again, by requeue or successor as it was submitted. The "
        "hold-off of a run that waits is lifted.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_run(parser)
    parser.add_argument("--now", action="store_true", help="scontrol requeue: do not wait for the save")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode."""
    show.make_printable()
    return exit_code_of(lambda: run(parse(argv)))


def run(arguments: argparse.Namespace) -> int:
    paths = find_run(arguments.run, arguments.root)
    [view] = look([paths], forgiving=False)
    words = requeue(paths, now=arguments.now, remedy=view.instead_of_requeue)
    make_console().print(f"{label(paths)}: {words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
