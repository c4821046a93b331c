"""What is asked for as a chain: the phases from the first one without evidence to the last one wanted."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

from encdec.errors import ConfigError, EncdecError
from encdec.files import RunPaths
from encdec.training.execution import StartingPoint, TrainingPhase, previous_phases
from encdec.training.promotion import read_gate
from encdec.training.run_config import RunConfig
from launchers.arguments import asked_run
from launchers.chain_file import read_chain
from launchers.planning.plan import Plan, make_plan
from launchers.run_directory import ROOT, choose_directory
from launchers.starting_point import require_steps_left, resume_word, starting_point


@dataclass(frozen=True)
class Link:
    """One phase of what is asked for."""

    phase: TrainingPhase
    run: RunConfig
    paths: RunPaths

    @property
    def passed(self) -> bool:
        """Whether its gate has been passed, by this very configuration."""
        gate = read_gate(self.paths, self.phase) if self.paths.root.is_dir() else None
        return gate is not None and gate.passed and gate.identity == self.run.identity

    def plan(self, cluster: str, why_cluster: str) -> Plan:
        return make_plan(self.run, run_dir=str(self.paths.root), cluster=cluster, why_cluster=why_cluster)


@dataclass(frozen=True)
class Asked:
    """All that a command line asks for."""

    links: list[Link]
    """In order; the phases that are missing before the wanted one come first."""
    root: Path | None
    """The chain's directory; None for a phase alone."""
    phase: TrainingPhase
    """The first one that was named; those before it are run because their gates have not been passed."""


def asked(arguments: Namespace) -> Asked:
    """The runs that a parsed command line asks for, and where they lie; nothing is written.

    Raises:
        ConfigError: any rule of the configuration broken.
    """
    start = starting_point(arguments)
    phases = asked_phases(arguments, direct=start is not None)
    first = asked_run(arguments, phases[0], start, arguments.name)
    if start and start.kind == "checkpoint":
        require_steps_left(Path(start.source), first)
    new = resume_word(arguments) == "never"
    if len(phases) == 1 and not (arguments.run_dir and read_chain(arguments.run_dir)):
        directory = choose_directory(arguments.run_dir, first.name, new=new)
        return Asked([Link(phases[0], first, RunPaths(directory))], None, phases[0])
    runs = [first, *following(arguments, first)]
    root = choose_directory(arguments.run_dir, arguments.name or f"chain-{runs[-1].identity[:8]}", new=new)
    if (root / "run.yaml").exists():
        raise ConfigError(
            "The directory of a chain holds its phases, each in one of its own",
            found=f"{root}, which is a run itself",
            remedy="Give the chain another --name or --run-dir",
        )
    links: list[Link] = []
    for phase, run in zip(phases, runs, strict=False):
        if links:
            run = replace(run, starts_from=StartingPoint("gate", str(links[-1].paths.root), links[-1].run.identity))
        if arguments.name:
            run = replace(run, name=f"{arguments.name}.{phase}")
        link = Link(phase, run, RunPaths(root / phase))
        links.append(link if new else proved_elsewhere(link))
    return Asked(links, root, TrainingPhase(arguments.phase))


def following(arguments: Namespace, first: RunConfig) -> list[RunConfig]:
    """The runs of all phases after the first one, asked for or not: together they say which chain it is."""
    assert first.phase is not None
    runs, before = [], first
    for phase in after(first.phase.phase):
        runs.append(asked_run(arguments, phase, StartingPoint("gate", "", before.identity), None))
        before = runs[-1]
    return runs


def asked_phases(arguments: Namespace, *, direct: bool) -> list[TrainingPhase]:
    """From the first phase that must be proved to the last one that is wanted.

    Args:
        direct: whether the first one that is named needs no proof.

    Raises:
        ConfigError: --through names a phase before --phase.
    """
    phase, last = TrainingPhase(arguments.phase), TrainingPhase(arguments.through or arguments.phase)
    if last in previous_phases(phase):
        raise ConfigError(
            "--through must name a phase after that of --phase",
            found=f"--phase {phase} --through {last}",
            remedy=f"The order is {', '.join(TrainingPhase)}",
        )
    wanted = [each for each in TrainingPhase if each not in previous_phases(phase) and each not in after(last)]
    return wanted if direct else previous_phases(phase) + wanted


def after(phase: TrainingPhase) -> list[TrainingPhase]:
    return [each for each in TrainingPhase if phase in previous_phases(each)]


def proved_elsewhere(link: Link) -> Link:
    """A phase that has been passed with the same configuration, alone or in another chain, needs not be run again."""
    if link.paths.root.exists():
        return link
    places = [ROOT / f"{link.phase}-{link.run.identity[:8]}", *sorted(ROOT.glob(f"chain-*/{link.phase}"))]
    others = (Link(link.phase, link.run, RunPaths(place.absolute())) for place in places)
    return next((other for other in others if passed_there(other)), link)


def passed_there(other: Link) -> bool:
    """Whether another run has passed; one that is damaged or closed to us has not, and refuses nothing here."""
    try:
        return other.paths.root.is_dir() and other.passed
    except (EncdecError, OSError):
        return False
