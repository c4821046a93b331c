"""python -m launchers.status [RUN...]: how runs stand, in Slurm's words and their own."""

from __future__ import annotations

import argparse
import json
import sys

from encdec.command_line import Help, Parser, exit_code_of
from launchers.names import add_run, find_runs, runs_under
from launchers.views import show
from launchers.views.overview import look
from launchers.views.progress import make_console
from launchers.views.tables import document, show_runs


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m launchers.status",
        description="Say how runs stand: where they run or wait, how they ended, what continues them.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_run(parser, nargs="*")
    parser.add_argument("--verbose", action="store_true", help="each run's attempts, too (for one RUN always)")
    parser.add_argument("--json", action="store_true", help="one JSON document (times in seconds since the epoch)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode."""
    show.make_printable()
    return exit_code_of(lambda: status(parse(argv)))


def status(arguments: argparse.Namespace) -> int:
    """One damaged run among many is a line that says so; asked for by name, it is an error."""
    named = [paths for word in arguments.run for paths in find_runs(word, arguments.root)]
    runs = named if arguments.run else runs_under(arguments.root)
    views = look(runs, forgiving=len(named) != 1)
    if arguments.json:
        print(json.dumps({"runs": [document(view) for view in views]}, indent=2))
    elif views:
        show_runs(views, verbose=arguments.verbose or len(named) == 1)
    else:
        make_console().print(f"no runs in {arguments.root.absolute()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
