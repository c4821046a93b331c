"""python -m launchers.submit --phase PHASE: plan, package and run one phase, here or on a cluster."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace

from encdec.command_line import exit_code_of
from encdec.files import RunPaths
from launchers.arguments import asked_run, parse_submit
from launchers.cluster import choose_cluster, require_devices, require_text
from launchers.cluster_file import read_cluster_file
from launchers.launch_options import launch_options
from launchers.plan import make_plan
from launchers.remote import job_request
from launchers.run_directory import choose_directory, find_run, make_or_find, require_accelerate_config, usable
from launchers.script import require_plain_path, sbatch_text
from launchers.start import run_phase
from launchers.views import show


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode, or 130 after Ctrl-C."""
    show.make_printable()
    return exit_code_of(lambda: submit(parse_submit(argv)))


def submit(arguments: Namespace) -> int:
    """Everything that can be refused is refused before anything is written."""
    run = asked_run(arguments)
    arguments.cluster_file = read_cluster_file(arguments.cluster)
    arguments.sbatch = {**arguments.cluster_file.flags, **arguments.sbatch}
    cluster, why = choose_cluster(arguments.cluster, run)
    if cluster == "local":
        require_devices(run)
    require_text(run)
    paths = RunPaths(choose_directory(arguments.run_dir, run.name, new=arguments.resume == "never"))
    if cluster == "slurm":
        require_plain_path(paths)
    plan = make_plan(run, run_dir=str(paths.root), cluster=cluster, why_cluster=why)
    with usable(paths):
        if arguments.launcher == "accelerate":
            require_accelerate_config(paths, run.config.infra.distributed_type)
        before = find_run(paths, run) if arguments.dry_run else make_or_find(paths, run, plan)
        if before:
            run = replace(run, name=arguments.name or before.name)
        show.plan(plan, continues=before is not None)
        if not arguments.dry_run:
            return run_phase(paths, run, plan, arguments, fresh=before is None)
        if cluster == "slurm":
            show.script(sbatch_text(job_request(paths, run, arguments, launch_options(paths, arguments))))
        return 0


if __name__ == "__main__":
    sys.exit(main())
