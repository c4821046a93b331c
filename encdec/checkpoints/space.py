"""Room on the storage of checkpoints, asked for before it is needed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

FILES_BESIDE_PAYLOAD = 6
"""Folder, payload folder, manifest and trainer state, the latter two also under their temporary names."""
BYTES_BESIDE_PAYLOAD = 1 << 16


def require_room(root: Path, nbytes: int, files: int) -> None:
    """Refuse to begin what cannot end: ``nbytes`` bytes in ``files`` new files, where ``root`` lies or will lie.

    Raises:
        OSError: ENOSPC, naming what is needed and what there is. Nothing was written.
    """
    place = next((place for place in (root, *root.parents) if place.is_dir()), Path("/"))
    room = os.statvfs(place)
    needed, free = nbytes + BYTES_BESIDE_PAYLOAD, room.f_bavail * room.f_frsize
    if needed > free:
        raise _no_room(f"{needed:,} bytes needed, {free:,} free", root)
    wanted = files + FILES_BESIDE_PAYLOAD
    if room.f_files and wanted > room.f_favail:  # file systems that make inodes as they go report 0
        raise _no_room(f"{wanted:,} inodes needed, {room.f_favail:,} free", root)


def _no_room(facts: str, root: Path) -> OSError:
    return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for a checkpoint ({facts})", str(root))
