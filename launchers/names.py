"""Runs by name: a directory below ./runs or --root, as much of its name as is unique, or a path."""

from __future__ import annotations

import argparse
import difflib
import os
from pathlib import Path

from encdec.errors import ConfigError, RunDirectoryError
from encdec.files import RunPaths
from launchers.run_directory import ROOT

MOST_NAMES_SHOWN = 5


def add_run(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """The arguments that say which run is meant."""
    names = {"nargs": nargs} if nargs else {}
    text = "name of a run, its beginning if no other run's begins so, or a run directory"
    parser.add_argument("run", metavar="RUN", help=text, **names)  # type: ignore[arg-type]
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="where runs are looked for by name")


def runs_under(root: Path) -> list[RunPaths]:
    """The run directories directly below ``root``, damaged ones included, by name; none if there is no ``root``.

    Raises:
        RunDirectoryError: it cannot be listed.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirectoryError(
            "Runs lie in a directory that can be listed",
            found=f"{root} ({error.strerror})",
            remedy="Give another one with --root, or open it",
        ) from None
    folders = (RunPaths(Path(entry.path).absolute()) for entry in entries if entry.is_dir() and entry.name[0] != ".")
    return [paths for paths in folders if looks_like_a_run(paths)]


def looks_like_a_run(paths: RunPaths) -> bool:
    """Whether the directory holds what only runs have; one that cannot be entered may."""
    signs = (paths.run_yaml, paths.plan, paths.attempts, paths.job)
    return any(map(os.path.lexists, signs)) or not os.access(paths.root, os.R_OK | os.X_OK)


def find_run(word: str, root: Path) -> RunPaths:
    """The run that ``word`` names.

    Raises:
        RunDirectoryError: a path of something else.
        ConfigError: no run's name begins so, or those of several do.
    """
    named = {paths.root.name: paths for paths in runs_under(root)}
    if word in named:
        return named[word]
    there = RunPaths(Path(word).absolute())
    if os.sep in word or os.path.lexists(there.run_yaml):
        if not there.root.is_dir() or not looks_like_a_run(there):
            raise RunDirectoryError(
                "A path must be that of a run directory",
                found=there.root,
                remedy="python -m launchers.status lists the runs below ./runs, or below --root DIR",
            )
        return there
    begun = [name for name in named if word and name.startswith(word)]
    if len(begun) == 1:
        return named[begun[0]]
    if begun:
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


def shortened(names: list[str]) -> str:
    """``names`` in a row, the first few of them if they are many."""
    return ", ".join(names[:MOST_NAMES_SHOWN]) + (", ..." if len(names) > MOST_NAMES_SHOWN else "")
