"""One run, one attempt at a time: find the one that lives, or start the next, here or on Slurm; a chain's phases in
their order.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from encdec.command_line import INTERRUPTED
from launchers import local, remote, slurm
from launchers.chain_file import CHAIN_FILE, read_chain, write_chain
from launchers.interrupts import Interrupts
from launchers.jobs import live_job, newest_jobs
from launchers.launch_options import launch_options
from launchers.ready import Start
from launchers.run_directory import describe, note
from launchers.run_status import only_starter, read_status, require_not_elsewhere
from launchers.views import show, tables, watch
from launchers.views.overview import look


def run_all(starts: Sequence[Start], arguments: Namespace, root: Path | None) -> int:
    """Run a phase alone, or a chain from its first phase that is not complete; returns the exit code to end with."""
    if root is None:
        return run_phase(starts[0], arguments)
    to_do = [start for start in starts if not start.complete]
    on_slurm = starts[0].plan.cluster == "slurm"
    in_one = note_chain(
        starts, to_do, root, in_one=arguments.in_one_allocation if on_slurm else arguments.wait is False
    )
    if not to_do:
        code = show.summary(starts[-1].paths, already=True)
    elif on_slurm:
        code = run_chain_on_slurm(to_do, arguments, in_one=in_one)
    elif in_one:
        code = run_phase(to_do[0], arguments)  # its job goes on with the others
    else:
        code = next((code for code in (run_phase(start, arguments) for start in to_do) if code), 0)
    tables.show_runs(look([start.paths for start in starts], forgiving=True), verbose=False)
    return code


def note_chain(starts: Sequence[Start], to_do: Sequence[Start], root: Path, *, in_one: bool) -> bool:
    """Write ``chain.json``; returns whether one job runs it all: a chain of which a job lives stays as it was cut."""
    before = read_chain(root)
    if before and any(live_job(start.paths) for start in to_do):
        in_one = before.in_one_allocation
    phases = {start.run.phase.phase: start.paths.root for start in starts if start.run.phase}
    write_chain(root, phases, in_one_allocation=in_one)
    return in_one


def run_chain_on_slurm(to_do: Sequence[Start], arguments: Namespace, *, in_one: bool) -> int:
    """Queue every phase at once, each after the one before, or none; follow them if asked."""
    with contextlib.ExitStack() as locks:
        for start in to_do:
            locks.enter_context(only_starter(start.paths))
        new = [start for start in to_do if live_job(start.paths) is None]
        try:
            queue(to_do, new, arguments, in_one=in_one)
        except BaseException as error:
            if not isinstance(error, slurm.Unanswered):
                take_back(new)
            raise
    if not arguments.wait:
        return 0
    codes = (watch.follow(start.paths, total_steps=start.run.num_train_steps) for start in to_do)
    code = next((code for code in codes if code), 0)
    if code != INTERRUPTED:
        watch.until_ended(start.paths for start in to_do)
    return code


def queue(to_do: Sequence[Start], new: Sequence[Start], arguments: Namespace, *, in_one: bool) -> None:
    """A job a phase, or one that runs them all."""
    first, *later = to_do
    find_or_start(first, arguments)
    for before, start in zip(to_do, later, strict=False):
        if not in_one:
            find_or_start(start, arguments, after=newest_jobs(before.paths))
        elif start in new:
            describe(start.paths, start.run, start.plan)
            remote.share(start.paths, start.run, arguments, newest_jobs(first.paths)[0])


def take_back(starts: Sequence[Start]) -> None:
    """A chain is queued whole or not at all: cancel what has been queued of it, remove what was made for the rest."""
    for start in reversed(starts):
        for job in newest_jobs(start.paths) if start.paths.root.is_dir() else ():
            slurm.cancel(job)
        if start.fresh and not start.paths.job.is_file() and start.paths.root.is_dir():
            shutil.rmtree(start.paths.root)
    for root in {start.paths.root.parent for start in starts}:
        if (root / CHAIN_FILE).is_file() and not any(path.is_dir() for path in root.iterdir()):
            (root / CHAIN_FILE).unlink()
            root.rmdir()


def run_phase(start: Start, arguments: Namespace) -> int:
    """Start an attempt unless one lives or all is done; follow it if asked."""
    paths = start.paths
    if start.complete:
        return show.summary(paths, already=True)
    with Interrupts() as interrupts:
        with only_starter(paths):
            job = find_or_start(start, arguments)
        if job is None and arguments.wait is not False:
            return local.follow(paths, interrupts, total_steps=start.run.num_train_steps)
    if job is None:
        return show.started(paths)
    if not arguments.wait or interrupts.count:
        return show.queued(job, paths)
    code = watch.follow(paths, total_steps=start.run.num_train_steps)
    if code != INTERRUPTED:
        watch.until_ended([paths])
    return code


def find_or_start(start: Start, arguments: Namespace, *, after: Sequence[str] = ()) -> str | None:
    """The Slurm job that is the run's, queued now or before; None: it runs on this machine, started now or before.

    Args:
        after: jobs whose end it waits for.
    """
    paths, run = start.paths, start.run
    remote.reconcile(paths, run)
    status, job = read_status(paths), live_job(paths)
    if status.running:
        show.attached(paths)
        return None
    if job is not None:
        show.followed(job, paths)
        return job
    require_not_elsewhere(paths, status)
    describe(paths, run, start.plan)
    note(paths, "command", text=arguments.command, directory=os.getcwd())
    if start.plan.cluster == "local":
        local.start(paths, run, launch_options(paths, arguments))
        return None
    with remote.removed_if_refused(paths, fresh=start.fresh):
        return remote.start(paths, run, arguments, after=after)
