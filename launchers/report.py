"""python -m launchers.report RUN: where a run's time went, its curves, alerts and gates."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from encdec.command_line import Help, Parser, exit_code_of
from launchers.names import add_run, find_run
from launchers.run_directory import usable
from launchers.views.account import show
from launchers.views.page import render
from launchers.views.page_file import require_page, write_page
from launchers.views.progress import make_console
from launchers.views.retrospect import as_json, look_back
from launchers.views.show import make_printable


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m launchers.report",
        description="Say where a run's time went: its wall time by part and by cause, productive time over wall time "
        "(ETTR) beside what the formula makes of its failures. Of a chain the phase that came furthest.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_run(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--html", type=Path, metavar="FILE",
        help="write one self-contained page instead, with curves over steps, attempts on a time line, alerts and gates",
    )  # fmt: skip
    how.add_argument("--json", action="store_true", help="one JSON document instead (times in seconds)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode."""
    make_printable()
    return exit_code_of(lambda: report(parse(argv)))


def report(arguments: argparse.Namespace) -> int:
    paths, now = find_run(arguments.run, arguments.root), time.time()
    if arguments.html is not None:
        require_page(arguments.html)
    with usable(paths):
        found = look_back(paths, now=now)
    if arguments.html is not None:
        write_page(arguments.html, page := render(found, now=now))
        make_console().print(f"wrote {arguments.html}, {len(page) / 1000:,.0f} kB")
    elif arguments.json:
        print(as_json(found))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
