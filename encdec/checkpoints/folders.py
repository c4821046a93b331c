"""The folder of checkpoints by its names: what is committed, what is unfinished, what moves out of the way.

step-<k>                        committed
step-<k>.tmp-<attempt>          being written
step-<k>.tmp-replaced-<pid>     whole, while a new one of the same step takes its name
step-<k>.tmp-deleted-<pid>      being deleted
quarantine/step-<k>.<ms>        proven wrong, with its REASON inside
quarantine/step-<k>.<ms>.REASON    of what is no folder, or a link to one that may be sound
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Literal

from encdec import files
from encdec.checkpoints.manifest import STEP_FOLDER
from encdec.errors import CheckpointError

log = logging.getLogger("encdec.train")
QUARANTINE = "quarantine"
REPLACED = re.compile(r"(step-\d+)\.tmp-replaced-\d+")
UNFINISHED_AVERAGE = re.compile(r"\.average-\d+\..+\.tmp")


def committed_steps(root: Path) -> list[int]:
    """Steps of the committed folders under ``root``, ascending.

    Raises:
        CheckpointError: something else is in the place of ``root``, or it cannot be listed.
    """
    return sorted(int(match.group(1)) for match in map(STEP_FOLDER.fullmatch, _names(root)) if match)


def _names(root: Path) -> list[str]:
    if not os.path.lexists(root):
        return []
    try:
        return sorted(os.listdir(root))
    except OSError as error:
        raise CheckpointError(
            f"Checkpoints must lie in a folder that can be listed, {root}",
            found=error,
            remedy="Mend the storage, or put the folder back where it was",
        ) from None


def make_empty(folder: Path, subfolder: str) -> None:
    """A folder that only its owner can enter, with nothing but an empty subfolder, whatever was there before."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / subfolder).mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)


def set_aside(folder: Path, why: Literal["replaced", "deleted"]) -> Path:
    """Rename ``folder``, so that a half-deleted one is never taken for a checkpoint; returns where it is now."""
    target = folder.with_name(f"{folder.name}.tmp-{why}-{os.getpid()}")
    os.rename(folder, target)
    return target


def delete(folder: Path) -> None:
    """Remove what nobody needs any more; if storage objects, that is no reason to stop training."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("cannot delete %s: %s", folder, error)


def discard(folder: Path) -> None:
    """Remove a checkpoint; that another program was faster is no error.

    Raises:
        OSError: storage does not let it be renamed.
    """
    try:
        aside = set_aside(folder, "deleted")
    except FileNotFoundError:
        return
    delete(aside)


def retire(folder: Path) -> None:
    """Remove a checkpoint that is not needed; as with ``delete``, storage that objects keeps it."""
    try:
        discard(folder)
    except OSError as error:
        log.warning("cannot delete %s: %s", folder, error)


def discard_unfinished(root: Path) -> None:
    """Delete what killed saves left under ``root``, but put back a whole checkpoint that one had set aside.

    Raises:
        CheckpointError: it cannot be put back, or ``root`` cannot be listed.
    """
    for name in _names(root):
        replaced = REPLACED.fullmatch(name)
        if replaced and not os.path.lexists(root / replaced.group(1)):  # killed between the two renames of a commit
            _put_back(root / name, root / replaced.group(1))
        elif ".tmp-" in name or UNFINISHED_AVERAGE.fullmatch(name):
            delete(root / name)


def _put_back(aside: Path, folder: Path) -> None:
    try:
        os.rename(aside, folder)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {aside} must get its name {folder.name} back",
            found=error,
            remedy="Mend the storage or the permissions and give the same command again",
        ) from None


def quarantine(folder: Path, reason: CheckpointError) -> bool:
    """Move a checkpoint that is proven wrong out of the way; whether storage let it."""
    shelf = folder.parent / QUARANTINE
    target = shelf / f"{folder.name}.{int(time.time() * 1000)}"
    try:
        shelf.mkdir(exist_ok=True)
        os.rename(folder, target)
    except OSError as error:
        log.warning("cannot move %s to quarantine: %s", folder, error)
        return False
    inside = target.is_dir() and not target.is_symlink()
    note = target / "REASON" if inside else target.with_name(f"{target.name}.REASON")
    try:
        files.atomic_write_text(note, f"{reason}\n")
        files.fsync_directory(folder.parent)
    except OSError as error:  # a full disk; the log has the reason
        log.warning("cannot write %s: %s", note, error)
    return True
