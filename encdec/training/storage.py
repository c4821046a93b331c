"""Storage that takes no more, told so that a user can mend it."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from encdec.errors import EncdecError

MENDABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG,  # no room
    errno.EROFS, errno.EACCES, errno.EPERM,  # no leave
    errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EIO,  # gone, or failing
}  # fmt: skip
"""Errors of open(2), write(2) and fsync(2) that lie with the storage, not with the program."""


@contextlib.contextmanager
def explained(rule: str, folder: Path) -> Iterator[None]:
    """Inside, an OSError of MENDABLE becomes an error for a user; it ends a run that can be continued.

    Args:
        rule: what must hold of ``folder``.
        folder: where things are stored; named where the error itself names no file.

    Raises:
        EncdecError: exit code 1, so that nothing tries again before the user does.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        raise EncdecError(
            rule,
            found=f"{error.strerror} at {error.filename or folder}, {free_space(folder)}",
            remedy="Free or open that storage, then give the same command again: it continues",
        ) from error


def free_space(folder: Path) -> str:
    """Bytes free where ``folder`` lies, in words."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):  # not made yet, or not answering: what lies above it tells as much
            return f"{shutil.disk_usage(place).free:,} bytes free in {place}"
    return f"nothing known about {folder}"
