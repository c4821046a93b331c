"""mirror: valid checkpoints to a second place, and back."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from encdec.checkpoints import folders
from encdec.checkpoints.catalog import best, described
from encdec.checkpoints.commands.shared import (
    checkpoints_of,
    megabytes,
    print_json,
    progress_bar,
    require_folder,
    size_of,
    writing,
)
from encdec.checkpoints.mirror import Copied, Mirror
from encdec.checkpoints.retention import Retention
from encdec.errors import CheckpointError, ConfigError
from encdec.files import RunPaths


def show(arguments: argparse.Namespace) -> int:
    """Returns 1 where a checkpoint was refused, whichever others were copied."""
    if arguments.all and not arguments.restore:
        raise ConfigError("--all goes with --restore", found="--all alone", remedy="All valid ones are copied anyway")
    mirror = Mirror(arguments.target)
    if arguments.restore:
        copied, refused = restore(mirror, RunPaths(require_folder(arguments.run)), every=arguments.all)
        deleted: list[int] = []
    else:
        root = checkpoints_of(arguments.run).output_dir
        _require_two_places(root, mirror)
        copied, refused = copy(mirror, root, read_back=arguments.verify)
        deleted = retain(mirror, arguments.keep) if arguments.keep else []
    if arguments.json:
        print_json(
            {"mirror": mirror.place.name, "checkpoints": [asdict(one) for one in copied],
             "refused": [str(error) for error in refused], "deleted": [f"step-{step}" for step in deleted]}
        )  # fmt: skip
    else:
        for one in copied:
            words = {"copied": "copied", "present": "there already", "gone": "deleted meanwhile"}[one.outcome]
            print(f"{one.checkpoint_id:<14} {words:<17} {megabytes(one.bytes)}")
        for step in deleted:
            print(f"step-{step:<9} deleted there: newer ones suffice")
        for error in refused:
            print(f"refused: {error}", file=sys.stderr)
    return 1 if refused else 0


def copy(mirror: Mirror, root: Path, *, read_back: bool) -> tuple[list[Copied], list[CheckpointError]]:
    """Copy all valid checkpoints of ``root``, the newest first; what became of each, and why others were refused."""
    copied, refused = [], []
    for step in reversed(folders.committed_steps(root)):
        folder = root / f"step-{step}"
        try:
            size = size_of(folder)
            with progress_bar(f"copying {folder.name}", size) as progress:
                one = mirror.copy_in(folder, progress)
            if read_back and one.outcome != "gone":
                with progress_bar(f"reading back {folder.name}", size) as progress:
                    mirror.verify(step, progress)
            copied.append(one)
        except CheckpointError as error:
            refused.append(error)
    return copied, refused


def retain(mirror: Mirror, keep: int) -> list[int]:
    """Delete the oldest beyond ``keep`` there, never the newest or the best; their steps."""
    infos = [described(manifest) for manifest in mirror.manifests()]
    if not infos:
        return []
    steps = [info.step for info in Retention(limit=keep).spare(infos, best(infos, "loss", "min"), infos[-1].step)]
    for step in steps:
        mirror.delete(step)
    return steps


def restore(mirror: Mirror, paths: RunPaths, *, every: bool) -> tuple[list[Copied], list[CheckpointError]]:
    """Copy the newest valid checkpoint back into a run, or all valid ones; as ``copy``.

    Raises:
        CheckpointError: the mirror has none.
    """
    inside = os.path.lexists(paths.checkpoints) or os.path.lexists(paths.run_yaml)
    root = paths.checkpoints if inside else paths.root
    copied: list[Copied] = []
    refused: list[CheckpointError] = []
    with mirror.place.reached():
        steps = mirror.place.steps()
    sizes = {manifest.step: described(manifest).bytes for manifest in mirror.manifests()}
    for step in reversed(steps):
        try:
            with progress_bar(f"restoring step-{step}", sizes.get(step, 0)) as progress, writing(root):
                copied.append(mirror.copy_out(step, root, progress))
        except CheckpointError as error:
            refused.append(error)
            continue
        if not every:
            break
    if not copied:
        raise (
            refused[0]
            if refused
            else CheckpointError(
                "A restore needs a checkpoint in the mirror",
                found=f"none in {mirror.place.name}",
                remedy="Correct the place",
            )
        )
    return copied, refused


def _require_two_places(root: Path, mirror: Mirror) -> None:
    if mirror.place.renames and Path(mirror.place.root).resolve() == root.resolve():
        raise ConfigError("A mirror must be another place", found=root, remedy="Give a folder on other storage")
