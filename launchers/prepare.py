"""python -m launchers.prepare --phase PHASE: what slurm/*.sbatch run first, inside their job."""

from __future__ import annotations

import os
import sys
from argparse import Namespace

from encdec.command_line import exit_code_of
from encdec.errors import ConfigError, MissingPrerequisite
from encdec.files import RunPaths
from launchers.arguments import asked_run, parse_prepare
from launchers.cluster import require_text
from launchers.cluster_file import read_cluster_file
from launchers.jobs import require_no_other_job
from launchers.plan import make_plan
from launchers.remote import enter
from launchers.run_directory import choose_directory, describe, make_or_find, usable
from launchers.run_status import only_starter, read_status
from launchers.script import require_plain_path


def main(argv: list[str] | None = None) -> int:
    """Prints the run directory, nothing where nothing is left to do. Returns an exit code of encdec.errors.ExitCode."""
    return exit_code_of(lambda: prepare(parse_prepare(argv)))


def prepare(arguments: Namespace) -> int:
    """Make the run directory, or find the one of the same configuration, and write the script that this job becomes."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise MissingPrerequisite(
            "launchers.prepare runs inside a batch job",
            found="no SLURM_JOB_ID",
            remedy=f"Type sbatch slurm/{arguments.phase}.sbatch",
        )
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        raise ConfigError(
            "A phase is one job, which requeues itself: it cannot be a task of an array",
            found=f"task {os.environ.get('SLURM_ARRAY_TASK_ID')} of array {os.environ['SLURM_ARRAY_JOB_ID']}",
            remedy="Submit without --array; for several runs give each its own --run-dir",
        )
    arguments.cluster_file = read_cluster_file(arguments.cluster)
    run = asked_run(arguments)
    require_text(run)
    paths = RunPaths(choose_directory(arguments.run_dir, run.name, new=False))
    require_plain_path(paths)
    with usable(paths):
        plan = make_plan(run, run_dir=str(paths.root), cluster="slurm", why_cluster=f"job {job}")
        make_or_find(paths, run, plan)
        with only_starter(paths):
            if read_status(paths).complete:
                print(f"{paths.root} is complete: nothing left to do", file=sys.stderr)
                return 0
            require_no_other_job(paths, job)
            describe(paths, run, plan)
            enter(paths, run, arguments, job)
    print(f"job {job} runs {paths.root}; its output is in {paths.submitit}", file=sys.stderr)
    print(paths.root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
