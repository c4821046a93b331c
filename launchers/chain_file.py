"""A chain of phases on disk: one run directory a phase, and ``chain.json`` that names them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from encdec.files import RunPaths, atomic_write_json, make_private
from encdec.records import read_record
from encdec.training.execution import TrainingPhase

CHAIN_FILE = "chain.json"


@dataclass(frozen=True, kw_only=True)
class ChainRecord:
    """Which phases a chain has, and how its jobs are cut."""

    phases: Mapping[TrainingPhase, str]
    """Phase -> its run directory, relative to the chain's unless it lies elsewhere."""
    in_one_allocation: bool = False
    """Whether the job of a phase goes on with the next one, instead of one job a phase."""


def read_chain(root: Path) -> ChainRecord | None:
    """The chain of a directory; None where it holds none.

    Raises:
        RunDirectoryError: a damaged file.
    """
    file = root / CHAIN_FILE
    return read_record(file, ChainRecord) if file.is_file() else None


def write_chain(root: Path, phases: Mapping[TrainingPhase, Path], *, in_one_allocation: bool) -> None:
    """Write ``chain.json``; phases that it has named before stay."""
    before = read_chain(root)
    named = dict(before.phases) if before else {}
    for phase, directory in phases.items():
        named[phase] = str(directory.relative_to(root)) if directory.is_relative_to(root) else str(directory)
    ordered = {phase: named[phase] for phase in TrainingPhase if phase in named}
    make_private(root)
    atomic_write_json(root / CHAIN_FILE, asdict(ChainRecord(phases=ordered, in_one_allocation=in_one_allocation)))


def runs_of(root: Path) -> dict[TrainingPhase, RunPaths]:
    """The run directories of a chain that are there, in order; none where ``root`` holds no chain.

    Raises:
        RunDirectoryError: a damaged file.
    """
    record = read_chain(root)
    paths = {phase: RunPaths(root / directory) for phase, directory in record.phases.items()} if record else {}
    return {phase: run for phase, run in paths.items() if run.root.is_dir()}


def chain_of(paths: RunPaths) -> Path | None:
    """The directory of the chain that a run is a phase of; None for a run alone."""
    return paths.root.parent if os.path.lexists(paths.root.parent / CHAIN_FILE) else None


def later_phases(paths: RunPaths) -> dict[TrainingPhase, RunPaths]:
    """The phases that wait for a run's gate, in order; none for a run alone."""
    runs, own = _chain_around(paths)
    return dict(runs[own + 1 :])


def earlier_phases(paths: RunPaths) -> dict[TrainingPhase, RunPaths]:
    """The phases whose gates a run waits for, in order; none for a run alone."""
    runs, own = _chain_around(paths)
    return dict(runs[:own]) if own < len(runs) else {}


def _chain_around(paths: RunPaths) -> tuple[list[tuple[TrainingPhase, RunPaths]], int]:
    """The phases of the chain that a run belongs to, and which of them it is."""
    root = chain_of(paths)
    runs = list(runs_of(root).items()) if root else []
    return runs, next((number for number, (_, run) in enumerate(runs) if run.root == paths.root), len(runs))


def label(paths: RunPaths) -> str:
    """What a run is called: its directory's name, with its chain's before it."""
    return f"{paths.root.parent.name}/{paths.root.name}" if chain_of(paths) else paths.root.name
