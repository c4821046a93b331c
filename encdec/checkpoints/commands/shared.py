"""What several tools do: find the folder that is meant, show progress, print a document."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from encdec.checkpoints import CheckpointManager
from encdec.checkpoints.manifest import MANIFEST, read_manifest
from encdec.checkpoints.pruning import DEFAULT_AVERAGED
from encdec.errors import CheckpointError, EncdecError
from encdec.files import RunPaths


def require_folder(path: Path) -> Path:
    """``path``, if it is a folder that can be listed.

    Raises:
        CheckpointError: it is none.
    """
    try:
        os.scandir(path).close()
    except OSError as error:
        raise CheckpointError(
            "A checkpoint is a folder that can be read",
            found=error,
            remedy="python -m encdec.checkpoints list RUN shows them",
        ) from None
    return path


def checkpoints_of(path: Path) -> CheckpointManager:
    """The checkpoints of a run directory, or of a folder of them."""
    inside = RunPaths(path).checkpoints
    return CheckpointManager(inside if os.path.lexists(inside) else require_folder(path))


def averaged_by(path: Path) -> int:
    """How many checkpoints a run averages at its end: ``training.average_last`` of its run.yaml, where that says it."""
    try:
        config = yaml.safe_load(RunPaths(path).run_yaml.read_text(encoding="utf-8"))["config"]
        return int(config["training"]["average_last"])
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return DEFAULT_AVERAGED


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is one checkpoint rather than a run."""
    return os.path.lexists(path / MANIFEST)


def size_of(folder: Path) -> int:
    """Bytes that a manifest lists; 0 where there is no sound one."""
    with contextlib.suppress(CheckpointError):
        return sum(record.bytes for record in read_manifest(folder).files)
    return 0


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of ``total`` bytes on a terminal's stderr, nothing anywhere else; yields what takes the bytes done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around whatever writes ``place``.

    Raises:
        EncdecError: storage refuses.
    """
    try:
        yield
    except OSError as error:
        raise EncdecError(
            f"It must be possible to write {place}",
            found=f"{error.strerror or error} at {error.filename or place}",
            remedy="Free or open that storage, then give the same command again; nothing half-made was left",
        ) from None


def print_json(document: Any) -> None:
    print(json.dumps(document))


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
