"""Runs by name: a directory below ./runs or --root, as much of its name as is unique, or a path. A chain's name stands
for all of its phases, ``CHAIN/PHASE`` for one of them.
"""

from __future__ import annotations

import argparse
import difflib
import os
from pathlib import Path

from encdec.errors import ConfigError, RunDirectoryError
from encdec.files import RunPaths
from launchers.chain_file import CHAIN_FILE, label, runs_of
from launchers.run_directory import ROOT

MOST_NAMES_SHOWN = 5


def add_run(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """The arguments that say which run is meant."""
    names = {"nargs": nargs} if nargs else {}
    text = "name of a run or chain, its beginning if no other's begins so, CHAIN/PHASE, or a directory"
    parser.add_argument("run", metavar="RUN", help=text, **names)  # type: ignore[arg-type]
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="where runs are looked for by name")


def runs_under(root: Path) -> list[RunPaths]:
    """The run directories below ``root``, those of chains and damaged ones included, by name; none if there is no
    ``root``.

    Raises:
        RunDirectoryError: it cannot be listed.
    """
    return list({run.root: run for runs in named_under(root).values() for run in runs}.values())


def named_under(root: Path) -> dict[str, list[RunPaths]]:
    """What there is below ``root`` by name: a run alone, or a chain with the phases that lie in it.

    Raises:
        RunDirectoryError: it cannot be listed.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunDirectoryError(
            "Runs lie in a directory that can be listed",
            found=f"{root} ({error.strerror})",
            remedy="Give another one with --root, or open it",
        ) from None
    found = {}
    for entry in entries:
        folder = Path(entry.path).absolute()
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if os.path.lexists(folder / CHAIN_FILE):
            found[entry.name] = phases_or_damage(folder)
        elif looks_like_a_run(RunPaths(folder)):
            found[entry.name] = [RunPaths(folder)]
    return found


def phases_or_damage(folder: Path) -> list[RunPaths]:
    """The phases of a chain; itself where its file is damaged, so that it is shown as a run that cannot be read."""
    try:
        return list(runs_of(folder).values())
    except RunDirectoryError:
        return [RunPaths(folder)]


def looks_like_a_run(paths: RunPaths) -> bool:
    """Whether the directory holds what only runs have; one that cannot be entered may."""
    signs = (paths.run_yaml, paths.plan, paths.attempts, paths.job)
    return any(map(os.path.lexists, signs)) or not os.access(paths.root, os.R_OK | os.X_OK)


def find_run(word: str, root: Path) -> RunPaths:
    """The one run that ``word`` names; of a chain the phase that came furthest.

    Raises:
        RunDirectoryError: a path of something else.
        ConfigError: no run's name begins so, or those of several do.
    """
    runs = find_runs(word, root)
    begun = [paths for paths in runs if paths.newest_attempt() is not None]
    return begun[-1] if begun else runs[0]


def find_runs(word: str, root: Path) -> list[RunPaths]:
    """The run that ``word`` names, or the phases of the chain.

    Raises:
        RunDirectoryError: a path of something else.
        ConfigError: no run's name begins so, or those of several do.
    """
    named = named_under(root)
    phases = {label(run): [run] for runs in named.values() for run in runs}
    there = Path(word).absolute()
    if chosen := named.get(word) or phases.get(word) or list(runs_of(there).values()):
        return chosen
    if os.sep in word or os.path.lexists(RunPaths(there).run_yaml):
        return [require_run(there, phases, word)]
    begun = [name for name in named if word and name.startswith(word)]
    if len(begun) == 1 and named[begun[0]]:
        return named[begun[0]]
    if len(begun) > 1:
        raise ConfigError(
            "A run's name may be cut as long as no other run's begins so",
            found=f"{word!r}, with which {len(begun)} begin: {shortened(begun)}",
            remedy="Give more of the name",
        )
    near = difflib.get_close_matches(word, named, n=3, cutoff=0.5)
    raise ConfigError(
        f"A run must be one of those in {root}",
        found=repr(word),
        remedy=f"Did you mean {' or '.join(near)}?"
        if near
        else f"There are {shortened(list(named)) or 'none'}; "
        "--root DIR looks elsewhere, and a path of a run directory will do, too",
    )


def require_run(there: Path, phases: dict[str, list[RunPaths]], word: str) -> RunPaths:
    """The run directory at a path, or the one phase whose ``CHAIN/PHASE`` begins so.

    Raises:
        RunDirectoryError: it is none.
    """
    if there.is_dir() and looks_like_a_run(RunPaths(there)):
        return RunPaths(there)
    begun = [name for name in phases if name.startswith(word)]
    if len(begun) == 1:
        return phases[begun[0]][0]
    raise RunDirectoryError(
        "A path must be that of a run directory",
        found=there,
        remedy="python -m launchers.status lists the runs below ./runs, or below --root DIR",
    )


def shortened(names: list[str]) -> str:
    """``names`` in a row, the first few of them if they are many."""
    return ", ".join(names[:MOST_NAMES_SHOWN]) + (", ..." if len(names) > MOST_NAMES_SHOWN else "")
