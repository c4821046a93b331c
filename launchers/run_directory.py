"""Makes a run directory whole or not at all, and refuses one that was made for something else."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import encdec
import launchers
from encdec.errors import ConfigError, MissingPrerequisite, RunDirectoryError
from encdec.files import ACCELERATE_CONFIGS, RunPaths, atomic_write_json, staged_directory
from encdec.records import JsonLinesWriter, event, read_record
from encdec.training.run_config import RunConfig, require_same_run
from launchers.planning.plan import Plan

ROOT = Path("runs")
SNAPSHOT = (encdec, launchers)
DIGESTS = "digests.json"
BYTES_OF_A_FULL_DISK = 1 << 16
STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE})


def choose_directory(asked: Path | None, name: str, *, new: bool) -> Path:
    """Where a run lives: as asked for, or ``runs/<name>``; if it must be new, a free one of that name.

    Raises:
        ConfigError: a path that the variables or scripts of a job cannot carry.
    """
    root = (asked or ROOT / name).absolute()
    if os.pathsep in str(root) or not str(root).isprintable():
        raise ConfigError(
            f"The path of a run directory must be printable and without {os.pathsep!r}, which separates Python's paths",
            found=repr(str(root)),
            remedy="Choose another with --run-dir",
        )
    number, free = 1, root
    while new and free.exists():
        number += 1
        free = root.with_name(f"{root.name}-{number}")
    return free


def make_run_directory(paths: RunPaths, run: RunConfig, plan: Plan) -> bool:
    """Write run.yaml, plan.json and the snapshot of the code into a new directory, in one rename; False if the
    directory came into being meanwhile.

    Raises:
        RunDirectoryError: not writable.
    """
    try:
        with staged_directory(paths.root) as staging:
            new = RunPaths(staging)
            describe(new, run, plan)
            snapshot_code(new.code)
            new.make()
            new.submitit.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise RunDirectoryError(
            "The run directory must be writable",
            found=f"{paths.root} ({reason_of(error)})",
            remedy="Choose another with --run-dir, or free or open the folder above it",
        ) from None
    note(paths, "created", name=run.name)
    return True


def find_run(paths: RunPaths, run: RunConfig) -> RunConfig | None:
    """The run that the directory holds; None if there is nothing.

    Raises:
        RunDirectoryError: it was made for something else.
    """
    return require_same_run(paths, run) if paths.root.exists() and any(paths.root.iterdir()) else None


def make_or_find(paths: RunPaths, run: RunConfig, plan: Plan) -> RunConfig | None:
    """The run that the directory held before; None if it was made now.

    Raises:
        RunDirectoryError: not writable, or made for something else.
    """
    before = find_run(paths, run)
    return before if before or make_run_directory(paths, run, plan) else require_same_run(paths, run)


def describe(paths: RunPaths, run: RunConfig, plan: Plan) -> None:
    """Write run.yaml and plan.json: when the directory is made, and before each start, whose place may be another."""
    run.write(paths.run_yaml)
    atomic_write_json(paths.plan, plan.to_mapping())


def reason_of(error: OSError) -> str:
    """The system's words for it; shutil collects those of several files as (source, target, words)."""
    return str(error.args[0][0][2]) if isinstance(error, shutil.Error) else str(error.strerror)


@contextlib.contextmanager
def usable(paths: RunPaths) -> Iterator[None]:
    """Storage that refuses what a command does with the run directory is the user's to mend.

    Raises:
        RunDirectoryError: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(paths.root)
        if not inside and error.errno not in STORAGE_ERRORS:
            raise
        raise RunDirectoryError(
            "The run directory must be readable and writable",
            found=f"{error.filename or paths.root} ({error.strerror})",
            remedy="Free or open it and give the same command again, or choose another with --run-dir",
        ) from None


def why_no_room(paths: RunPaths) -> tuple[str, str] | None:
    """Why nothing can be written into the run directory any more, and what to do first; None where it can.

    Tried, not looked up: a file system that its kernel has closed after an error is still listed as writable.
    """
    free = shutil.disk_usage(paths.root).free
    if free < BYTES_OF_A_FULL_DISK:
        return f"the disk is full: {free:,} bytes are free for {paths.root}", "free space"
    try:
        tempfile.TemporaryFile(dir=paths.root).close()
    except OSError as error:
        return f"nothing can be written into {paths.root}: {error.strerror}", "make it writable"
    return None


def require_snapshot(paths: RunPaths) -> None:
    """A job whose snapshot is damaged would run other code, or whatever is installed.

    Raises:
        RunDirectoryError: naming the first file that is missing, new or changed.
    """
    recorded = read_record(paths.code / DIGESTS, dict[str, str])
    there = digests_of(paths.code)
    changed = sorted(set(recorded.items()) ^ set(there.items()))
    if changed:
        name = changed[0][0]
        how = "missing" if name not in there else "new" if name not in recorded else "changed"
        raise RunDirectoryError(
            "A run goes on with the code it was made with",
            found=f"{paths.code / name}, which is {how}",
            remedy="Restore code/ from a copy (code/git.json names its commit), or make a new run with another "
            "--run-dir or --name",
        )


def require_accelerate_config(paths: RunPaths, engine: str) -> None:
    """accelerate launch reads a configuration file, which a run gets with its code.

    Raises:
        MissingPrerequisite: it is not in the run's snapshot, or where a new run's is made from.
    """
    file = (paths.code if paths.code.is_dir() else own_code()) / ACCELERATE_CONFIGS[engine]
    if not file.is_file():
        raise MissingPrerequisite(
            "accelerate launch needs its configuration file",
            found=f"no {file}",
            remedy="Leave --launcher accelerate out, or make a new run from a checkout, which has configs/",
        )


def note(paths: RunPaths, kind: str, **facts: Any) -> None:
    """One line in the run's own ledger (the launcher's; attempts have their own)."""
    with JsonLinesWriter(paths.events) as ledger:
        ledger.write(event(kind, **facts))


def snapshot_code(target: Path) -> None:
    """Copy the packages as they are now, with the state of their git checkout if they lie in one, and Accelerate's
    configurations if they lie beside them (an installed package has none).
    """
    for package in SNAPSHOT:
        source = Path(package.__path__[0])
        shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("*.tmp"))
    for file in ACCELERATE_CONFIGS.values():
        if (own_code() / file).is_file():
            (target / file).parent.mkdir(exist_ok=True)
            shutil.copy(own_code() / file, target / file)
    atomic_write_json(target / "git.json", git_state(own_code()))
    atomic_write_json(target / DIGESTS, digests_of(target))


def digests_of(code: Path) -> dict[str, str]:
    """SHA-256 of each source file of a snapshot, by its path in it."""
    sources = sorted(path for path in code.rglob("*.py"))
    return {str(path.relative_to(code)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}


def own_code() -> Path:
    """The folder that the running packages lie in: a checkout, a snapshot, or where packages are installed."""
    return Path(encdec.__path__[0]).parent


def code_environment(paths: RunPaths) -> dict[str, str]:
    """Variables with which a job runs the snapshot, not the checkout."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.code), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",  # python -m would put the working directory first
    }


def git_state(folder: Path) -> dict[str, str | None]:
    """Commit and uncommitted changes of the checkout; None where there is no git."""

    def git(*words: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False, timeout=30,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    return {"commit": git("rev-parse", "HEAD"), "uncommitted": git("status", "--porcelain")}
