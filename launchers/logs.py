"""python -m launchers.logs RUN: what a run's ranks and jobs say, the first error first."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from encdec.command_line import Help, Parser, exit_code_of
from encdec.errors import ConfigError
from encdec.files import RunPaths
from launchers.names import add_run, find_run
from launchers.run_directory import usable
from launchers.views import log_files, show
from launchers.views.log_following import follow


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m launchers.logs",
        description="Show the end of a log of a run. If a rank has failed in that attempt, its error comes first.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_run(parser)
    parser.add_argument("--attempt", type=int, metavar="N", help="attempt (default: the newest)")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="rank")
    parser.add_argument("--restart", type=int, metavar="N", help="start of the ranks in place (default: the newest)")
    parser.add_argument("--job", action="store_true", help="what the job itself wrote, not a rank")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends, through all its attempts")
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="lines from the end")
    arguments = parser.parse_args(argv)
    for flag in ("attempt", "rank", "restart", "lines"):
        value = getattr(arguments, flag)
        if value is not None and value < 0:
            raise ConfigError(f"--{flag} must be at least 0", found=value, remedy=f"Give --{flag} a number from 0 on")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode, or 130 after Ctrl-C."""
    show.make_printable()
    return exit_code_of(lambda: logs(parse(argv)))


def logs(arguments: argparse.Namespace) -> int:
    paths = find_run(arguments.run, arguments.root)
    newest_log = functools.partial(chosen_log, paths, arguments)
    with usable(paths):
        number = paths.newest_attempt() if arguments.attempt is None else arguments.attempt
        error = None if arguments.job or number is None else log_files.first_error(paths.attempt(number))
        if error:
            print(error.said, *error.lines, "", sep="\n")
        if arguments.follow:
            follow(paths, newest_log, lines=arguments.lines)
            return 0
        what = "the job" if arguments.job else f"rank {arguments.rank}, attempt {'-' if number is None else number}"
        log = log_files.require_log(newest_log(), what, paths)
        print(f"==> {log} <==", *log_files.last_lines(log, arguments.lines)[0], sep="\n")
    return 0


def chosen_log(paths: RunPaths, arguments: argparse.Namespace) -> Path | None:
    """The log that the arguments ask for, as it is now."""
    number = paths.newest_attempt() if arguments.attempt is None else arguments.attempt
    if arguments.job:
        return log_files.job_log(paths, number)
    return None if number is None else log_files.rank_log(paths.attempt(number), arguments.rank, arguments.restart)


if __name__ == "__main__":
    sys.exit(main())
