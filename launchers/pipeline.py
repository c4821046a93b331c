"""python -m launchers.pipeline {run,progressive} ... -- FLAGS: the pipeline, its scales trained by launchers.submit.

python -m launchers.pipeline progressive --config configs/pipeline_tiny.yaml -- --cluster slurm --nodes 2 --time 60

What stands before ``--`` goes to encdec.pipeline, what follows to launchers.submit. This command judges what was
trained, so it loads torch: give it where that may be done, not on a crowded login node.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from encdec.command_line import exit_code_of
from encdec.errors import ConfigError
from launchers import submit
from launchers.arguments import parse_submit

DECIDED = frozenset(
    {
        "--phase",
        "--through",
        "--from-weights",
        "--config",
        "--run-dir",
        "--name",
        "--resume",
        "--wait",
        "--no-wait",
        "--dry-run",
    }
)
PHASE = "sanity_check"
"""A scale's file has the same numbers for every phase, and this one asks for no gate before it."""


def main(argv: list[str] | None = None) -> int:
    """Returns what the pipeline returns: 0, 3 for a gate, 75 for a clean stop, 78 for what is refused."""
    return exit_code_of(lambda: pipeline(sys.argv[1:] if argv is None else argv))


def pipeline(words: Sequence[str]) -> int:
    own, flags = split(words)
    if {"-h", "--help"} & set(own):
        print(f"{__doc__}\nWhat stands before --:\n")
    command_line("any.yaml", "anywhere", flags)  # mistakes in the flags end before the first scale is trained
    from encdec.pipeline import __main__ as program  # loads torch

    return program.main(own, launch=lambda config, run_dir: submit.main(command_line(str(config), str(run_dir), flags)))


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the pipeline's, launchers.submit's)"""
    if "--" not in words:
        return list(words), []
    mark = list(words).index("--")
    return list(words[:mark]), list(words[mark + 1 :])


def command_line(config: str, run_dir: str, flags: Sequence[str]) -> list[str]:
    """launchers.submit's arguments for one scale.

    Raises:
        ConfigError: ``flags`` name what the pipeline decides, or cannot be understood.
    """
    decided = [flag for flag in flags if flag.split("=")[0] in DECIDED]
    if decided:
        raise ConfigError(
            "The pipeline decides which phase, configuration and directory a scale has, and waits for its end",
            found=decided[0],
            remedy="Leave it out after --; --config and --checkpoint-dir stand before",
        )
    command = ["--phase", PHASE, "--config", config, "--run-dir", str(Path(run_dir)), "--wait", *flags]
    parse_submit(command)
    return command


if __name__ == "__main__":
    sys.exit(main())
