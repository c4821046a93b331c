"""python -m launchers.submit --phase PHASE: plan, package and run a phase or a chain of them, here or on a cluster."""

from __future__ import annotations

import os
import sys
from argparse import Namespace

from encdec.command_line import exit_code_of
from encdec.files import RunPaths
from launchers.arguments import parse_submit
from launchers.chain import asked
from launchers.cluster import choose_cluster
from launchers.cluster_file import read_cluster_file
from launchers.env_secrets import require_names, require_unkept, require_values
from launchers.ready import Start, make_all, require_preflight, require_what_runs_need, show_plans, with_outlook
from launchers.run_directory import find_run, require_accelerate_config, usable
from launchers.start import run_all
from launchers.views import show


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode, or 130 after Ctrl-C."""
    show.make_printable()
    return exit_code_of(lambda: submit(parse_submit(argv)))


def submit(arguments: Namespace) -> int:
    """Everything that can be refused is refused before anything is written."""
    require_names(arguments.env_secret)
    wanted = asked(arguments)
    arguments.cluster_file = read_cluster_file(arguments.cluster)
    arguments.sbatch = {**arguments.cluster_file.flags, **arguments.sbatch}
    cluster, why = choose_cluster(arguments.cluster, wanted.links[-1].run)
    starts = [Start(link.paths, link.run, link.plan(cluster, why), fresh=True) for link in wanted.links]
    require_what_runs_need(starts, arguments, cluster)
    require_values(arguments.env_secret, os.environ)
    if cluster == "slurm":
        require_unkept(arguments.env_secret)
    if arguments.preflight:
        require_preflight(starts[-1], arguments)
    with usable(RunPaths(wanted.root or starts[0].paths.root)):
        if arguments.launcher == "accelerate":
            for start in starts:
                require_accelerate_config(start.paths, start.run.config.infra.distributed_type)
        found = [start.joined_to(find_run(start.paths, start.run), arguments) for start in starts]  # or it is refused
        starts, scripts = with_outlook(found, arguments)
        if arguments.json:
            return show.as_json([start.plan for start in starts], scripts)
        if not arguments.dry_run:
            starts = make_all(starts, arguments)
        show_plans(wanted, starts, in_full=arguments.dry_run)
        if not arguments.dry_run:
            return run_all(starts, arguments, wanted.root)
        for script in filter(None, scripts):
            show.script(script)
        return 0


if __name__ == "__main__":
    sys.exit(main())
