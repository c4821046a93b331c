"""Files that others write while we look on: a look costs what is new, however long a file has become."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from encdec.records import records_of

Value = TypeVar("Value")
Signature = tuple[int, int, int] | None
"""Inode, size in bytes, time of modification in nanoseconds; None: nothing to be seen."""


class GrowingFile:
    """Whole lines of a file that is only appended to; each look reads on from where the last one ended.

    A file that was cut or replaced is read from its beginning. A last line without its end waits for the next look.

    Args:
        path: the file, which need not be there yet.
        last_bytes: of what is there at the first look only so much is read, from the first whole line on; None: all.
    """

    def __init__(self, path: Path, *, last_bytes: int | None = None) -> None:
        self.path = path
        self.bytes_read = 0
        """Over all looks."""
        self.beginnings = 0
        """Times that it was read from its beginning: more than one, if it was cut or replaced."""
        self._last_bytes = last_bytes
        self._offset = 0
        self._inode: int | None = None

    def fresh(self) -> list[bytes]:
        """The lines that have come since the last look, without their ends; none from a file that is not there."""
        try:
            there = os.stat(self.path)
            if there.st_ino == self._inode and there.st_size == self._offset:
                return []
            with self.path.open("rb") as stream:
                return self._read(stream.fileno())
        except FileNotFoundError:
            return []

    def _read(self, descriptor: int) -> list[bytes]:
        there = os.fstat(descriptor)
        begins_anew = there.st_ino != self._inode or there.st_size < self._offset
        if begins_anew:
            skipped = 0 if self._last_bytes is None else max(0, there.st_size - self._last_bytes)
            self._inode, self._offset = there.st_ino, skipped
            self.beginnings += 1
        content = os.pread(descriptor, there.st_size - self._offset, self._offset)
        self.bytes_read += len(content)
        whole, newline, _ = content.rpartition(b"\n")
        cut = begins_anew and self._offset > 0  # the first line is the end of one
        self._offset += len(whole) + len(newline)
        return whole.splitlines()[cut:] if newline else []


def records_between(path: Path, count: int) -> list[dict[str, Any]]:
    """Some ``count`` records of a JSON-lines file, evenly spaced, in order: a picture of a file of any length for
    ``count`` small reads. All of a file that has no more.
    """
    longest = 1 << 12  # bytes of a record, with room
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= count * longest:
            lines = stream.read().splitlines()
            return list(records_of(lines[:: max(1, len(lines) // count)]))
        found = []
        for number in range(count):
            block = os.pread(stream.fileno(), 2 * longest, size * number // count)
            lines = block.splitlines()[1 if number else 0 :]  # the first may be the end of one
            found += list(records_of(lines[:1]))
        return found


class Memory:
    """What has been read of files, so that only those that have changed are read again."""

    def __init__(self) -> None:
        self._values: dict[tuple[Path, ...], tuple[tuple[Signature, ...], object]] = {}
        self._ledgers: dict[Path, tuple[GrowingFile, list[dict[str, Any]]]] = {}
        self.reads = 0
        """Times that ``recall`` had to read."""

    def recall(self, files: tuple[Path, ...], read: Callable[[], Value]) -> Value:
        """What ``read`` made of ``files``; it is called again once one of them has changed, come or gone. Its errors
        are not remembered.
        """
        now = tuple(map(signature, files))  # before they are read: what changes meanwhile is read again next time
        known = self._values.get(files)
        if known is None or known[0] != now:
            self.reads += 1
            known = self._values[files] = (now, read())
        return cast("Value", known[1])

    def ledger(self, path: Path) -> list[dict[str, Any]]:
        """All records of a JSON-lines file so far, oldest first; none where there is no file. Not to be changed."""
        file, records = self._ledgers.setdefault(path, (GrowingFile(path), []))
        before = file.beginnings
        fresh = list(records_of(file.fresh()))
        if file.beginnings != before:
            records.clear()
        records += fresh
        return records


def signature(path: Path) -> Signature:
    """What tells one state of a file from another; None of one that is not there, or that we may not see."""
    try:
        there = os.stat(path)
    except OSError:
        return None
    return there.st_ino, there.st_size, there.st_mtime_ns
