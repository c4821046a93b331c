"""What submitit carries: the path of a run directory, and nothing else. Everything else is read from there."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from launchers.nodes.forkserver import listen_early, start_forkserver


class RunPhase:
    """One attempt of the run in ``run_dir``. Tiny and stable, so that a pickled one outlives changes of the code.

    Args:
        run_dir: the run directory, absolute.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def __call__(self) -> int:
        """Run the attempt to its end; returns its exit code, which under Slurm becomes the task's own."""
        code = run(Path(self.run_dir))
        if code and "SLURM_PROCID" in os.environ and os.environ.get("SUBMITIT_EXECUTOR") != "local":
            raise SystemExit(code)  # submitit would end the task with 0, and Slurm would call the job COMPLETED
        return code


def run(run_dir: Path) -> int:
    """This node's part of an attempt; returns its exit code."""
    listen_early()
    if forks_ranks(run_dir):
        start_forkserver()  # before all else: it loads torch while this process is still loading its own modules
    from encdec.errors import EncdecError
    from encdec.files import RunPaths
    from launchers.nodes.attempt import run_attempt
    from launchers.nodes.chain import go_on, next_phase_here
    from launchers.run_directory import usable

    paths = RunPaths(run_dir)
    try:
        with usable(paths):
            code = run_attempt(paths)
            following = next_phase_here(paths)
            if following is not None:
                go_on(following)
            return code
    except EncdecError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def forks_ranks(run_dir: Path) -> bool:
    """Whether the ranks will be forks; those of Accelerate are programs. The modules that know launch.json well would
    take as long to load as the forkserver gains; they judge the file later.
    """
    with contextlib.suppress(OSError):
        return b'"launcher": "accelerate"' not in (run_dir / "launch.json").read_bytes()
    return True


def main(argv: list[str] | None = None) -> int:
    from encdec.command_line import Parser, exit_code_of

    parser = Parser(
        prog="python -m launchers.job", description="Run one attempt of a run directory here.", allow_abbrev=False
    )
    parser.add_argument("run_dir", type=Path, help="a run directory made by launchers.submit")
    return exit_code_of(lambda: run(parser.parse_args(argv).run_dir.absolute()))


if __name__ == "__main__":
    sys.exit(main())
