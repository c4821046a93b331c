"""python -m launchers.submit --phase PHASE: plan, package and run one phase, here or on a cluster."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from encdec.errors import EncdecError
from encdec.files import RunPaths
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import RunConfig, require_same_run, resolve_run
from launchers import local, remote, show
from launchers.arguments import parse_submit
from launchers.cluster import choose_cluster, require_devices, require_text
from launchers.plan import Plan, make_plan
from launchers.run_directory import make_run_directory, read_status

ROOT = Path("runs")


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode."""
    try:
        return submit(parse_submit(argv))
    except EncdecError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def submit(arguments: Namespace) -> int:
    """Everything that can be refused is refused before anything is written."""
    run = resolve_run(
        TrainingPhase(arguments.phase),
        config_file=arguments.config,
        settings=arguments.set,
        nodes=arguments.nodes,
        ranks_per_node=arguments.gpus_per_node,
        name=arguments.name,
    )
    cluster, why = choose_cluster(arguments.cluster, run)
    if cluster == "local":
        require_devices(run)
    require_text(run)
    paths = RunPaths((arguments.run_dir or ROOT / run.name).absolute())
    if arguments.resume == "never":
        paths = unused_directory(paths)
    plan = make_plan(run, run_dir=str(paths.root), cluster=cluster, why_cluster=why)
    exists = paths.root.exists() and any(paths.root.iterdir())
    if exists:
        require_same_run(paths, run)
    fresh = not (arguments.dry_run or paths.run_yaml.is_file())
    if fresh:
        make_run_directory(paths, run, plan)
    show.plan(plan, continues=exists)
    return 0 if arguments.dry_run else run_phase(paths, run, plan, arguments, fresh=fresh)


def run_phase(paths: RunPaths, run: RunConfig, plan: Plan, arguments: Namespace, *, fresh: bool) -> int:
    """Start an attempt unless one lives or all is done; follow it if asked. A fresh directory goes if Slurm refuses."""
    status = read_status(paths)
    if status.complete:
        return show.summary(paths, already=True)
    job = remote.live_job(paths)
    if status.running or (plan.cluster == "local" and job is None):
        return local.run_here(paths, run, wait=arguments.wait is not False)
    if job is None:
        with remote.removed_if_refused(paths, fresh=fresh):
            job = remote.start(paths, run, arguments.sbatch)
    else:
        show.followed(job, paths)
    return remote.follow(paths, job, total_steps=run.num_train_steps) if arguments.wait else show.queued(job, paths)


def unused_directory(paths: RunPaths) -> RunPaths:
    """``paths`` if it is free, else the first of its name with -2, -3, ... that is."""
    root, number = paths.root, 1
    while root.exists():
        number += 1
        root = paths.root.with_name(f"{paths.root.name}-{number}")
    return RunPaths(root)


if __name__ == "__main__":
    sys.exit(main())
