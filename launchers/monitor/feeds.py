"""What a run says line by line: its ledgers' events and its ranks' logs, read on at each look."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from encdec.files import AttemptPaths, RunPaths
from encdec.records import records_of
from launchers.monitor.words import printable
from launchers.views.growing_files import GrowingFile, Memory
from launchers.views.log_files import FirstError, first_error, rank_log

BYTES_OF_A_LOG = 1 << 18
"""Read from its end at the first look."""
RANK_OF_LOG = re.compile(r"rank-(\d+)\.restart-\d+\.err")
UNTOLD = frozenset({"event", "time", "evidence"})
"""Facts of an event that its line has elsewhere, or that are for programs."""


class Feed(Protocol):
    """Lines that become more."""

    def fresh(self) -> list[str]:
        """Those since the last look, printable."""


class Events:
    """The events of a run, of all its attempts, nodes and ranks, in order of time as far as one look sees them.

    Args:
        paths: the run directory.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._ledgers: dict[Path, GrowingFile] = {}
        self._over: set[int] = set()
        """Attempts that were read once more after they were over: nobody writes there any more."""

    def fresh(self) -> list[str]:
        told = [
            (number, writer, record)
            for number, writer, file in self._files()
            for record in records_of(self._ledgers.setdefault(file, GrowingFile(file)).fresh())
        ]
        return [event_line(*one) for one in sorted(told, key=lambda one: moment(one[2]))]

    def _files(self) -> Iterable[tuple[int | None, str, Path]]:
        yield None, "launcher", self._paths.events
        numbers = self._paths.attempt_numbers()
        for number in numbers:
            if number in self._over:
                continue
            over = is_over(self._paths, number, numbers)  # before it is read
            for file in sorted(self._paths.attempt(number).root.glob("events-*.jsonl")):
                yield number, file.stem.removeprefix("events-"), file
            if over:
                self._over.add(number)


class Log:
    """The end of a log, and what is added to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GrowingFile(path, last_bytes=BYTES_OF_A_LOG)

    def fresh(self) -> list[str]:
        return [printable(line.decode("utf-8", errors="replace")) for line in self._file.fresh()]


@dataclass(frozen=True)
class AttemptError:
    """The first error of an attempt, and of which one."""

    attempt: int
    error: FirstError

    @property
    def rank(self) -> int | None:
        """The rank that failed first."""
        found = RANK_OF_LOG.search(self.error.said)
        return int(found.group(1)) if found else None


def moment(record: Mapping[str, Any]) -> float:
    when = record.get("time")
    return float(when) if isinstance(when, int | float) else 0.0


def event_line(attempt: int | None, writer: str, record: Mapping[str, Any]) -> str:
    """``09:41:45  2 node-0  restarting: restart 1``."""
    when = time.strftime("%H:%M:%S", time.localtime(moment(record)))
    told = {name: value for name, value in record.items() if name not in UNTOLD and value is not None}
    facts = ", ".join(f"{name} {fact(value)}" for name, value in told.items())
    kind = str(record.get("event")).replace("_", " ")
    where = f"{'' if attempt is None else attempt:>3} {writer:<8}"
    return printable(f"{when} {where} {kind}: {facts}" if facts else f"{when} {where} {kind}")


def fact(value: object) -> str:
    """A value in few characters; moments keep their seconds."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def is_over(paths: RunPaths, number: int, attempts: Collection[int]) -> bool:
    """Whether an attempt has an outcome and another has come after it."""
    return number < max(attempts) and paths.attempt(number).outcome.is_file()


def newest_error(
    paths: RunPaths, attempts: Collection[int], memory: Memory, over: dict[int, FirstError | None]
) -> AttemptError | None:
    """The first error of the newest attempt in which a rank has failed; None where none has.

    Args:
        memory: what has been read of the ledgers before.
        over: what was found in attempts that are over, by number; those are not looked at again. Added to.
    """
    for number in sorted(attempts, reverse=True):
        if number in over:
            found = over[number]
        else:
            ends = is_over(paths, number, attempts)  # before it is read
            found = error_of(paths.attempt(number), memory)
            if ends:
                over[number] = found
        if found:
            return AttemptError(number, found)
    return None


def error_of(attempt: AttemptPaths, memory: Memory) -> FirstError | None:
    """The first error of an attempt, read again where its nodes' ledgers have changed."""
    ledgers = tuple(sorted(attempt.root.glob("events-node-*.jsonl")))
    return memory.recall(ledgers, lambda: first_error(attempt)) if ledgers else None


def ranks_with_logs(attempt: AttemptPaths) -> list[int]:
    """Ranks of an attempt that have written a log, ascending."""
    names = (RANK_OF_LOG.fullmatch(path.name) for path in attempt.root.glob("logs/node-*/rank-*.err"))
    return sorted({int(match.group(1)) for match in names if match})


def log_of(paths: RunPaths, attempt: int | None, rank: int) -> Path | None:
    """The log of a rank's newest start in an attempt; None where there is none."""
    return None if attempt is None else rank_log(paths.attempt(attempt), rank, None)
