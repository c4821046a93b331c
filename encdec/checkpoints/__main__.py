"""python -m encdec.checkpoints {list,verify,digest,average,export,prune,mirror} ..."""

from __future__ import annotations

import sys

from encdec.checkpoints.commands import arguments
from encdec.command_line import exit_code_of


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where a checkpoint is not as it must be, 78 for a command line that cannot work."""
    return exit_code_of(lambda: run(argv))


def run(argv: list[str] | None) -> int:
    parsed = arguments.parse(argv)
    return parsed.tool(parsed)


if __name__ == "__main__":
    sys.exit(main())
