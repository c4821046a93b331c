"""python -m launchers.submit --phase PHASE: plan, package and run a phase or a chain of them, here or on a cluster."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from encdec.command_line import exit_code_of
from encdec.errors import MissingPrerequisite
from encdec.files import RunPaths
from launchers.arguments import parse_submit
from launchers.chain import Asked, asked
from launchers.cluster import choose_cluster, require_devices, require_text
from launchers.cluster_file import read_cluster_file
from launchers.launch_options import launch_options
from launchers.preflight import checklist, failed, lines
from launchers.remote import job_request
from launchers.run_directory import find_run, require_accelerate_config, usable
from launchers.script import require_plain_path, sbatch_text
from launchers.start import Start, make_all, run_all
from launchers.views import show


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode, or 130 after Ctrl-C."""
    show.make_printable()
    return exit_code_of(lambda: submit(parse_submit(argv)))


def submit(arguments: Namespace) -> int:
    """Everything that can be refused is refused before anything is written."""
    wanted = asked(arguments)
    arguments.cluster_file = read_cluster_file(arguments.cluster)
    arguments.sbatch = {**arguments.cluster_file.flags, **arguments.sbatch}
    cluster, why = choose_cluster(arguments.cluster, wanted.links[-1].run)
    starts = [Start(link.paths, link.run, link.plan(cluster, why), fresh=True) for link in wanted.links]
    require_what_runs_need(starts, arguments, cluster)
    if arguments.preflight:
        require_preflight(starts[-1], arguments)
    with usable(RunPaths(wanted.root or starts[0].paths.root)):
        if arguments.launcher == "accelerate":
            for start in starts:
                require_accelerate_config(start.paths, start.run.config.infra.distributed_type)
        found = [start.joined_to(find_run(start.paths, start.run), arguments) for start in starts]  # or it is refused
        starts = found if arguments.dry_run else make_all(starts, arguments)
        show_plans(wanted, starts, in_full=arguments.dry_run)
        if not arguments.dry_run:
            return run_all(starts, arguments, wanted.root)
        if cluster == "slurm":
            for start in starts:
                options = launch_options(start.paths, arguments)
                show.script(sbatch_text(job_request(start.paths, start.run, arguments, options)))
        return 0


def require_what_runs_need(starts: Sequence[Start], arguments: Namespace, cluster: str) -> None:
    """Devices, text and paths that the place can use.

    Raises:
        EncdecError: naming what is missing.
    """
    for start in starts:
        if cluster == "local":
            require_devices(start.run)
        else:
            require_plain_path(start.paths)
    require_text(starts[-1].run)


def require_preflight(start: Start, arguments: Namespace) -> None:
    """Print the checklist, of a chain that of its last phase, which needs the most.

    Raises:
        MissingPrerequisite: a check fails.
    """
    checks = checklist(start.run, start.paths, gpu_memory_gb=arguments.cluster_file.gpu_memory_gb)
    print(*lines(checks), "", sep="\n")
    if failed(checks):
        raise MissingPrerequisite(
            "No check of --preflight may fail",
            found=", ".join(check.name for check in checks if check.verdict == "fail"),
            remedy="Mend what it names above; nothing has been started",
        )


def show_plans(wanted: Asked, starts: Sequence[Start], *, in_full: bool) -> None:
    """The plan of a phase alone; of a chain, what its phases share, a line for each, and if ``in_full`` each plan."""
    if wanted.root is None:
        show.plan(starts[0].plan, continues=not starts[0].fresh)
        return
    states = [
        "passed" if link.passed else "new" if start.fresh else "goes on"
        for link, start in zip(wanted.links, starts, strict=True)
    ]
    show.chain(wanted.root, [start.plan for start in starts], states, asked=wanted.phase)
    for start in starts if in_full else ():
        print()
        show.plan(start.plan, continues=not start.fresh)


if __name__ == "__main__":
    sys.exit(main())
