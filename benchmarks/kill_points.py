"""Where a rank dies: at a file operation on its checkpoints, seen through Python's audit events.

Python tells an audit hook of every open, rename, mkdir and removal before it happens, in whichever thread: the program
that is killed runs as it is, nothing in it is patched but one call: that by which an engine copies its state, which no
event tells of. What happens between two operations (the copy itself, writes into an open file, collectives) is reached
by a kill from outside, some milliseconds after one of them.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from encdec.checkpoints.payload import ENGINES, payload_named
from encdec.distributed import LONG_WORK

Scope = Literal["one rank", "all ranks", "agent and all"]
SCOPES: tuple[Scope, ...] = ("one rank", "all ranks", "agent and all")

COPY = "the state is copied"
SHARD = "a shard is written"
BETWEEN = "between shards and manifest"
MANIFEST = "the manifest is written"
BEFORE = "before the commit's rename"
AFTER = "after the commit's rename"
REPLACE = "a step is committed again"
PRUNE = "old ones are deleted"
QUARANTINE = "a damaged one is moved away"
CLEAR = "leftovers are cleared up"
READ = "verifying and loading"
AVERAGE = "the average at the end is made"
ANY = "any operation on checkpoints"
MOMENT = "any moment"
PLACES = (COPY, SHARD, BETWEEN, MANIFEST, BEFORE, AFTER, REPLACE, PRUNE, QUARANTINE, CLEAR, READ, AVERAGE, ANY, MOMENT)
SHARED = (COPY, SHARD, BETWEEN, READ, ANY, MOMENT)
"""Places that every rank comes to; the others are rank 0's."""

UNFINISHED = re.compile(r"step-\d+\.tmp-\d+")
COMMITTED = re.compile(r"step-\d+")
WRITES = os.O_WRONLY | os.O_RDWR
REACHED, OVERDUE = b"r", b"o"
"""Told to whoever watches: the place was reached; it was not, and the rank dies at the next operation instead."""


@dataclass(frozen=True)
class Kill:
    """One kill, as drawn."""

    place: str
    scope: Scope
    victim: int
    """Rank that looks for the place."""
    nth: int
    """Which operation of that place; the first is 1."""
    delay: float
    """Seconds between the operation, or the start of the ranks for MOMENT, and a kill from outside; 0: the victim
    kills before the operation happens."""
    overdue: int
    """Operations on checkpoints after which a victim that has not come to the place dies where it is."""


@dataclass(frozen=True)
class Operation:
    """One file operation, its paths relative to the folder of checkpoints."""

    kind: Literal["copy", "read", "write", "rename", "mkdir", "remove", "list", "chmod"]
    path: str
    """Empty: the folder itself. What is removed inside a tree has the tree's path."""
    target: str = ""
    """New path of what is renamed."""


def classify(operation: Operation, before: str) -> str:
    """The place that ``operation`` belongs to, ``before`` being that of the operation before it in the same thread."""
    path, target = operation.path, operation.target
    if before == AVERAGE or path.startswith(".average-"):
        return AVERAGE
    if operation.kind == "copy":
        return COPY
    if operation.kind == "list" and before in ("", CLEAR):  # a start lists twice: what is left over, what is committed
        return READ if before else CLEAR
    top, _, inside = path.partition("/")
    if "quarantine" in (top, target.partition("/")[0]):
        return QUARANTINE
    if operation.kind == "rename" and ".tmp-replaced-" in target:
        return REPLACE
    if operation.kind == "rename" and ".tmp-deleted-" in target:
        return PRUNE
    if operation.kind == "rename" and COMMITTED.fullmatch(target):
        if not UNFINISHED.fullmatch(path):
            return CLEAR  # a whole one that had been set aside gets its name back
        return REPLACE if before == REPLACE else BEFORE
    if ".tmp-replaced-" in top or ".tmp-deleted-" in top:
        return {REPLACE: REPLACE, PRUNE: PRUNE}.get(before, CLEAR)
    if UNFINISHED.fullmatch(top):
        return _classify_unfinished(operation, inside, before)
    if operation.kind == "read" and not path and before in (BEFORE, REPLACE):  # the folder is opened to be synced
        return AFTER if before == BEFORE else REPLACE
    if before in (AFTER, REPLACE, PRUNE):
        return PRUNE  # whose first part is to read all manifests
    return READ if COMMITTED.fullmatch(top) else before


def _classify_unfinished(operation: Operation, inside: str, before: str) -> str:
    if operation.kind == "remove":
        return CLEAR if before == CLEAR else SHARD
    if "manifest.json" in inside:
        return MANIFEST
    if "/" in inside and operation.kind in ("write", "mkdir"):
        return SHARD
    return SHARD if operation.kind == "mkdir" else BETWEEN


class Watch:
    """An audit hook that counts operations and kills at the drawn one. Armed once in a process, for ever.

    Args:
        root: the folder of checkpoints.
        kill: what was drawn.
        notify: file descriptor of a pipe that is told REACHED or OVERDUE.
        die: kills whom the scope names, this process among them.
    """

    def __init__(self, root: Path, kill: Kill, notify: int, die: Callable[[], None]) -> None:
        self._root, self._kill, self._notify, self._die = str(root), kill, notify, die
        self._seen = self._matched = 0
        self._done = False
        self._threads = threading.local()

    def arm(self) -> None:
        """From now on."""
        sys.addaudithook(self._on_event)
        for name in ENGINES:
            self._see_copies_of(type(payload_named(name)))

    def _see_copies_of(self, payload: Any) -> None:
        copy = payload.snapshot

        def snapshot(*arguments: Any, **named: Any) -> Any:
            self._count(Operation("copy", ""))
            return copy(*arguments, **named)

        payload.snapshot = snapshot

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        reader = READERS.get(event)
        operation = reader and self._seen_by(event, reader(arguments))
        if operation:
            self._count(operation)

    def _count(self, operation: Operation) -> None:
        if self._done:
            return
        # without a mirror, the average is the one long work on checkpoints
        first = AVERAGE if threading.current_thread().name.startswith(LONG_WORK) else ""
        place = classify(operation, getattr(self._threads, "place", first))
        self._threads.place = place
        self._seen += 1
        self._matched += self._kill.place in (place, ANY)
        if self._matched >= self._kill.nth:
            self._strike(REACHED)
        elif self._seen >= self._kill.overdue:
            self._strike(OVERDUE)

    def _strike(self, why: bytes) -> None:
        self._done = True
        os.write(self._notify, why)
        if not self._kill.delay:
            self._die()

    def _seen_by(self, event: str, found: tuple[Any, ...]) -> Operation | None:
        """The operation with its paths made relative, or None where it is not about checkpoints."""
        kind, path, *target = found
        if path is None:  # inside a tree that is being removed, relative to an open folder
            tree = getattr(self._threads, "tree", None)
            return None if tree is None else Operation("remove", tree)
        relative = self._relative(path)
        self._threads.tree = relative if event == "shutil.rmtree" else None
        if relative is None:
            return None
        return Operation(kind, relative, (self._relative(target[0]) or "") if target else "")

    def _relative(self, path: Any) -> str | None:
        if not isinstance(path, str | os.PathLike):
            return None
        text = str(path)
        if text == self._root:
            return ""
        return text[len(self._root) + 1 :] if text.startswith(f"{self._root}/") else None


def _opened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    path, _, flags = arguments
    return ("write" if flags & WRITES else "read"), path


def _removed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    path, folder = arguments
    return "remove", None if folder >= 0 else path


READERS: dict[str, Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {
    "open": _opened,
    "os.rename": lambda arguments: ("rename", arguments[0], arguments[1]),
    "os.mkdir": lambda arguments: ("mkdir", arguments[0]),
    "os.listdir": lambda arguments: ("list", arguments[0]),
    "os.chmod": lambda arguments: ("chmod", arguments[0]),
    "os.remove": _removed,
    "os.rmdir": _removed,
    "shutil.rmtree": lambda arguments: ("remove", arguments[0]),
}
"""Audit event -> (kind, path, where a rename goes) from its arguments."""


def strike(scope: Scope, agent: int, ranks: int, victim: int) -> None:
    """SIGKILL whom ``scope`` names: the process ``victim``, the process group ``ranks``, the process ``agent``."""
    if scope == "agent and all":
        os.kill(agent, signal.SIGKILL)
    if scope == "one rank":
        os.kill(victim, signal.SIGKILL)
    else:
        os.killpg(ranks, signal.SIGKILL)
