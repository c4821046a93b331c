"""What a command has ready before it starts anything: each phase's run, directory and plan, shown, and all that they
need, looked at.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace

from encdec.errors import MissingPrerequisite
from encdec.files import RunPaths
from encdec.training.promotion import read_gate
from encdec.training.run_config import RunConfig
from launchers.chain import Asked, Link
from launchers.cluster import require_devices, require_text
from launchers.planning.outlook import Prospect, foreseen
from launchers.planning.plan import Plan
from launchers.run_directory import make_or_find, note
from launchers.run_status import read_status
from launchers.script import require_plain_path
from launchers.views import show


@dataclass(frozen=True)
class Start:
    """A run that is to be started, or gone on with."""

    paths: RunPaths
    run: RunConfig
    plan: Plan
    fresh: bool
    """Whether its directory was made by this command."""

    @property
    def complete(self) -> bool:
        return read_status(self.paths).complete

    def joined_to(self, before: RunConfig | None, arguments: Namespace) -> Start:
        """With the name of the run that its directory holds already, unless another is asked for."""
        if before is None:
            return self
        return replace(self, run=self.run if arguments.name else replace(self.run, name=before.name), fresh=False)


def make_all(starts: Sequence[Start], arguments: Namespace) -> list[Start]:
    """Make the directories that are not there yet.

    Raises:
        RunDirectoryError: not writable, or made for something else.
    """
    made = []
    for start in starts:
        before = make_or_find(start.paths, start.run, start.plan)
        if before is None and start.run.starts_from and start.run.starts_from.kind != "gate":
            note(start.paths, "unproved", weights=start.run.starts_from.source)
        made.append(replace(start, fresh=True) if before is None else start.joined_to(before, arguments))
    return made


def with_outlook(
    starts: Sequence[Start], arguments: Namespace, *, inside_job: bool = False
) -> tuple[list[Start], list[str | None]]:
    """The starts with forecasts in their plans, and what sbatch would get for each.

    Raises:
        ConfigError: one cannot work where it is to run.
    """
    dry = getattr(arguments, "dry_run", False)
    prospects = [Prospect(start.paths, start.run, start.plan, new=start.fresh or dry) for start in starts]
    outlooks = foreseen(prospects, arguments, inside_job=inside_job)
    planned = [replace(start, plan=outlook.plan) for start, outlook in zip(starts, outlooks, strict=True)]
    return planned, [outlook.script for outlook in outlooks]


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
    from launchers.preflight import checklist, failed, lines  # not loaded by every submission

    checks = checklist(start.run, start.paths, gpu_memory_gb=arguments.cluster_file.gpu_memory_gb)
    print(*lines(checks), "", sep="\n")
    if failed(checks):
        raise MissingPrerequisite(
            "No check of --preflight may fail",
            found=", ".join(check.name for check in checks if check.verdict == "fail"),
            remedy="Mend what it names above; nothing has been started",
        )


def state_of(link: Link, start: Start) -> str:
    """How a phase of a chain stands before the command does anything."""
    if link.passed:
        return "passed"
    if start.fresh or start.paths.newest_attempt() is None:
        return "new"
    gate = read_gate(start.paths, link.phase)
    return "closed" if gate and not gate.passed else "goes on"


def show_plans(wanted: Asked, starts: Sequence[Start], *, in_full: bool) -> None:
    """The plan of a phase alone; of a chain, what its phases share, a line for each, and if ``in_full`` each plan."""
    if wanted.root is None:
        show.plan(starts[0].plan, continues=not starts[0].fresh)
        return
    states = [state_of(link, start) for link, start in zip(wanted.links, starts, strict=True)]
    show.chain(wanted.root, [start.plan for start in starts], states, asked=wanted.phase)
    for start in starts if in_full else ():
        print()
        show.plan(start.plan, continues=not start.fresh)
