"""One run, one attempt at a time: find the one that lives, or start the next, here or on Slurm."""

from __future__ import annotations

import os
from argparse import Namespace

from encdec.files import RunPaths
from encdec.training.run_config import RunConfig
from launchers import local, remote
from launchers.interrupts import Interrupts
from launchers.jobs import live_job
from launchers.launch_options import launch_options
from launchers.plan import Plan
from launchers.run_directory import describe, note
from launchers.run_status import only_starter, read_status, require_not_elsewhere
from launchers.views import show, watch


def run_phase(paths: RunPaths, run: RunConfig, plan: Plan, arguments: Namespace, *, fresh: bool) -> int:
    """Start an attempt unless one lives or all is done; follow it if asked."""
    if read_status(paths).complete:
        return show.summary(paths, already=True)
    with Interrupts() as interrupts:
        with only_starter(paths):
            job = find_or_start(paths, run, plan, arguments, fresh=fresh)
        if job is None and arguments.wait is not False:
            return local.follow(paths, interrupts, total_steps=run.num_train_steps)
    if job is None:
        return show.started(paths)
    if arguments.wait and not interrupts.count:
        return watch.follow(paths, total_steps=run.num_train_steps)
    return show.queued(job, paths)


def find_or_start(paths: RunPaths, run: RunConfig, plan: Plan, arguments: Namespace, *, fresh: bool) -> str | None:
    """The Slurm job that is the run's, queued now or before; None: it runs on this machine, started now or before."""
    remote.reconcile(paths, run)
    status, job = read_status(paths), live_job(paths)
    if status.running:
        show.attached(paths)
        return None
    if job is not None:
        show.followed(job, paths)
        return job
    require_not_elsewhere(paths, status)
    describe(paths, run, plan)
    note(paths, "command", text=arguments.command, directory=os.getcwd())
    if plan.cluster == "local":
        local.start(paths, run, launch_options(paths, arguments))
        return None
    with remote.removed_if_refused(paths, fresh=fresh):
        return remote.start(paths, run, arguments)
