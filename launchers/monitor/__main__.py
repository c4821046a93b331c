"""python -m launchers.monitor [RUN...]: all runs, live: a table, and what one of them says; keys act on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from encdec.command_line import Help, Parser, exit_code_of
from encdec.errors import ConfigError, MissingPrerequisite
from encdec.files import RunPaths
from launchers.monitor.observatory import Observatory
from launchers.monitor.printed import print_once, write_once
from launchers.names import add_run, find_runs, runs_under
from launchers.views import show
from launchers.views.slurm_watch import SECONDS_BETWEEN_SQUEUES, SlurmWatch

LEAST_SECONDS_BETWEEN_SQUEUES = 1.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m launchers.monitor",
        description="Show all runs, live. Slurm is asked once in --interval for all of them, the rest is read from "
        "their directories every two seconds. Enter opens a run: its events, its ranks' logs, its first error. c, r "
        "and s cancel, requeue and save the chosen one, after a question.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_run(parser, nargs="*")
    parser.add_argument("--once", action="store_true", help="print the table and end, as without a terminal")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON document (times in seconds since the epoch)")
    how.add_argument(
        "--html", type=Path, metavar="FILE", help="write the table as one page that loads nothing, and end"
    )
    parser.add_argument(
        "--interval", type=float, default=SECONDS_BETWEEN_SQUEUES, metavar="SECONDS",
        help="least time between two questions to Slurm, at least 1",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if not arguments.interval >= LEAST_SECONDS_BETWEEN_SQUEUES:
        raise ConfigError(
            f"--interval must be at least {LEAST_SECONDS_BETWEEN_SQUEUES:g} s: a controller answers others, too",
            found=f"{arguments.interval:g}",
            remedy="Leave it out: 30 s",
        )
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode."""
    show.make_printable()
    return exit_code_of(lambda: monitor(parse(argv)))


def monitor(arguments: argparse.Namespace) -> int:
    """A damaged run among many is a line that says so; a name that fits none is an error."""
    observatory = Observatory(finder(arguments), SlurmWatch(arguments.interval))
    streams = (sys.stdin, sys.stdout, sys.stderr)  # the last is what the live view is drawn on
    if arguments.html:
        write_once(observatory, arguments.html)
        return 0
    if arguments.json or arguments.once or not all(stream.isatty() for stream in streams):
        print_once(observatory, as_json=arguments.json)
        return 0
    open_live_view(observatory)
    return 0


def finder(arguments: argparse.Namespace) -> Callable[[], Sequence[RunPaths]]:
    """Which runs there are: those that are named, or all below --root, new ones included.

    Raises:
        ConfigError: a name that fits no run.
    """
    if not arguments.run:
        return lambda: runs_under(arguments.root)
    named = {paths.root: paths for word in arguments.run for paths in find_runs(word, arguments.root)}
    return lambda: list(named.values())


def open_live_view(observatory: Observatory) -> None:
    """Until q is typed.

    Raises:
        MissingPrerequisite: textual is not installed.
    """
    try:
        from launchers.monitor.app import Monitor  # slow to import: only where it is looked at
    except ModuleNotFoundError as error:
        raise MissingPrerequisite(
            "The live view needs textual",
            found=str(error),
            remedy="pip install textual, or --once, which needs it not",
        ) from None
    Monitor(observatory).run()


if __name__ == "__main__":
    sys.exit(main())
