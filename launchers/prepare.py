"""python -m launchers.prepare --phase PHASE: what slurm/*.sbatch run first, inside their job."""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import Namespace

from encdec.command_line import exit_code_of
from encdec.errors import ConfigError, MissingPrerequisite
from encdec.files import RunPaths
from launchers import slurm
from launchers.arguments import parse_prepare
from launchers.chain import asked
from launchers.chain_file import write_chain
from launchers.cluster import require_text
from launchers.cluster_file import read_cluster_file
from launchers.env_secrets import require_names, require_values, warn_of_accounting
from launchers.jobs import require_no_other_job
from launchers.ready import Start, make_all, with_outlook
from launchers.remote import share
from launchers.run_directory import describe, usable
from launchers.run_status import only_starter
from launchers.script import made_inside, require_plain_path


def main(argv: list[str] | None = None) -> int:
    """Prints the run directory, nothing where nothing is left to do. Returns an exit code of encdec.errors.ExitCode."""
    return exit_code_of(lambda: prepare(parse_prepare(argv)))


def prepare(arguments: Namespace) -> int:
    """Make the run directory, or find the one of the same configuration, and write the script that this job becomes.
    Phases before that have not passed their gates are run first, in the same job.
    """
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
    require_names(arguments.env_secret)
    require_values(arguments.env_secret, os.environ)
    warn_of_accounting(arguments.env_secret)
    arguments.cluster_file = read_cluster_file(arguments.cluster)
    wanted = asked(arguments)
    require_text(wanted.links[-1].run)
    for link in wanted.links:
        require_plain_path(link.paths)
    starts = [Start(link.paths, link.run, link.plan("slurm", f"job {job}"), fresh=True) for link in wanted.links]
    with usable(RunPaths(wanted.root or starts[0].paths.root)):
        to_do = [start for start in make_all(starts, arguments) if not start.complete]
        with contextlib.ExitStack() as locks:
            for start in to_do:
                locks.enter_context(only_starter(start.paths))
                require_no_other_job(start.paths, job)
            if wanted.root:
                phases = {link.phase: link.paths.root for link in wanted.links}
                write_chain(wanted.root, phases, in_one_allocation=True)
            if not to_do:
                print(f"{wanted.root or starts[0].paths.root} is complete: nothing left to do", file=sys.stderr)
                return 0
            arguments.sbatch = slurm.flags_of(slurm.job_facts(job))
            to_do, _ = with_outlook(to_do, arguments, inside_job=True)
            for start in to_do:
                describe(start.paths, start.run, start.plan)
                share(start.paths, start.run, arguments, job, mark=made_inside(job) if start is to_do[0] else "")
            slurm.describe(job, f"encdec run {to_do[0].paths.root}")  # a later start of the job finds the run by it
    phases_to_do = ", then ".join(str(start.paths.root) for start in to_do)
    print(f"job {job} runs {phases_to_do}; its output is in {to_do[0].paths.submitit}", file=sys.stderr)
    print(to_do[0].paths.root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
