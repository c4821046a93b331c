"""Makes a run directory whole or not at all, and refuses one that was made for something else."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import encdec
import launchers
from encdec.errors import ConfigError, MissingPrerequisite, RunDirectoryError
from encdec.files import ACCELERATE_CONFIG, RunPaths, atomic_write_json, staged_directory
from encdec.records import JsonLinesWriter, event
from encdec.training.run_config import RunConfig
from launchers.plan import Plan

ROOT = Path("runs")
SNAPSHOT = (encdec, launchers)
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
            run.write(new.run_yaml)
            atomic_write_json(new.plan, plan.to_mapping())
            snapshot_code(new.code)
            new.make()
            new.submitit.mkdir()
            staging.chmod(0o750)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunDirectoryError(
            "The run directory must be writable",
            found=f"{paths.root} ({error.strerror})",
            remedy="Choose another with --run-dir, or free or open the folder above it",
        ) from None
    note(paths, "created", name=run.name)
    return True


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


def why_full(paths: RunPaths) -> str | None:
    """A sentence about the storage of the run directory if nothing can be written there any more, else None."""
    free = shutil.disk_usage(paths.root).free
    return f"the disk is full: {free:,} bytes are free for {paths.root}" if free < BYTES_OF_A_FULL_DISK else None


def require_snapshot(paths: RunPaths) -> None:
    """A job whose snapshot is gone would run whatever code is installed.

    Raises:
        RunDirectoryError: naming what is missing.
    """
    for package in SNAPSHOT:
        name = Path(package.__path__[0]).name
        if not (paths.code / name / "__init__.py").is_file():
            raise RunDirectoryError(
                "A run goes on with the code it was made with",
                found=f"no {name} in {paths.code}",
                remedy="Restore code/ from a copy (code/git.json names its commit), or make a new run with another "
                "--run-dir or --name",
            )


def require_accelerate_config(code: Path) -> None:
    """accelerate launch reads a configuration file, which a run gets with its code.

    Args:
        code: where the packages lie: the run's snapshot, or what it will be made of.

    Raises:
        MissingPrerequisite: it does not lie beside them.
    """
    file = code / ACCELERATE_CONFIG
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
    configuration if it lies beside them (an installed package has none).
    """
    for package in SNAPSHOT:
        source = Path(package.__path__[0])
        shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("*.tmp"))
    if (own_code() / ACCELERATE_CONFIG).is_file():
        (target / ACCELERATE_CONFIG).parent.mkdir()
        shutil.copy(own_code() / ACCELERATE_CONFIG, target / ACCELERATE_CONFIG)
    atomic_write_json(target / "git.json", git_state(own_code()))


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
