"""python -m launchers.cancel RUN...: end what lives of a run; it saves first."""

from __future__ import annotations

import argparse
import sys

from encdec.command_line import Help, Parser, exit_code_of
from encdec.errors import EncdecError
from encdec.files import RunPaths
from launchers.chain_file import label
from launchers.control import cancel
from launchers.names import add_run, find_runs
from launchers.views import show
from launchers.views.overview import look
from launchers.views.progress import make_console


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m launchers.cancel",
        description="Cancel runs: they finish their step, save and end, and nothing continues them by itself. A run "
        "that waits never starts. The same submit command continues a cancelled run.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_run(parser, nargs="+")
    parser.add_argument("--now", action="store_true", help="end it at once, without saving")
    parser.add_argument("--yes", action="store_true", help="do not ask before several runs are cancelled")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode."""
    show.make_printable()
    return exit_code_of(lambda: run(parse(argv)))


def run(arguments: argparse.Namespace) -> int:
    """All names are understood before anything is cancelled; a run that cannot be does not spare the others. Of a chain
    the last phase goes first: it would start at the end of the one before.
    """
    named = {paths.root: paths for word in arguments.run for paths in reversed(find_runs(word, arguments.root))}
    if len(set(arguments.run)) > 1 and not arguments.yes and sys.stdin.isatty() and not agreed(list(named.values())):
        print("nothing is cancelled")
        return 0
    code = 0
    for paths in named.values():
        try:
            for line in cancel(paths, now=arguments.now) or [nothing_lives(paths)]:
                make_console().print(f"{label(paths)}: {line}")
        except EncdecError as error:
            print(f"error: {error}", file=sys.stderr)
            code = code or error.exit_code
    return code


def agreed(runs: list[RunPaths]) -> bool:
    """Ask at the terminal."""
    names = ", ".join(label(paths) for paths in runs)
    try:
        return input(f"cancel {len(runs)} runs ({names})? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def nothing_lives(paths: RunPaths) -> str:
    [view] = look([paths], forgiving=True)
    return f"nothing of it is live: {view.standing.words}"


if __name__ == "__main__":
    sys.exit(main())
