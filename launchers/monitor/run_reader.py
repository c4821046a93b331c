"""What one run says: its events or a rank's log, as chosen, and its first error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from encdec.files import RunPaths
from launchers.monitor import feeds, words
from launchers.views.growing_files import Memory
from launchers.views.log_files import FirstError


@dataclass(frozen=True)
class Choice:
    """What is shown of a run: its events, or the log of a rank in an attempt."""

    log: bool = False
    attempt: int | None = None
    """None: the newest."""
    rank: int | None = None
    """None: the one that failed first in the newest attempt that has one, or else rank 0 of the chosen attempt."""


@dataclass(frozen=True)
class News:
    """What a look found."""

    choice: Choice
    rank: int
    attempt: int | None
    """Which were meant; None before the first attempt."""
    source: str
    """What the lines are from."""
    anew: bool
    """Whether they take the place of what was shown before."""
    lines: list[str]
    error: feeds.AttemptError | None


class RunReader:
    """Reads what one run says; a look reads what is new.

    Args:
        paths: the run directory.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths, self._memory = paths, Memory()
        self._over: dict[int, FirstError | None] = {}
        self._choice: Choice | None = None
        self._path: Path | None = None
        self._feed: feeds.Feed | None = None

    def look(self, choice: Choice) -> News:
        """The lines that are new of what is chosen; all there are, up to a bound, if that is chosen since now."""
        numbers = self._paths.attempt_numbers()
        error = feeds.newest_error(self._paths, numbers, self._memory, self._over)
        number, rank = meant(choice, numbers, error)
        path = feeds.log_of(self._paths, number, rank) if choice.log else None
        anew = self._choice != choice
        if anew or path != self._path:
            self._feed = self._open(choice, path)
        self._choice, self._path = choice, path
        try:
            lines = self._feed.fresh() if self._feed else []
        except OSError as refused:
            lines = [words.printable(str(refused))]
        source = "events" if not choice.log else f"attempt {'-' if number is None else number}, rank {rank}"
        source += "" if not choice.log or path else ": no log yet"
        return News(choice, rank, number, source, anew, lines, error)

    def _open(self, choice: Choice, path: Path | None) -> feeds.Feed | None:
        if not choice.log:
            return feeds.Events(self._paths)
        return feeds.Log(path) if path else None

    def ranks(self, attempt: int | None) -> list[int]:
        """Ranks that have a log in an attempt."""
        return [] if attempt is None else feeds.ranks_with_logs(self._paths.attempt(attempt))

    def attempts(self) -> list[int]:
        return self._paths.attempt_numbers()


def meant(choice: Choice, attempts: list[int], error: feeds.AttemptError | None) -> tuple[int | None, int]:
    """Which attempt (None before the first) and rank a choice is about. Pure."""
    newest = attempts[-1] if attempts else None
    if choice.rank is None and error and error.rank is not None and choice.attempt in (None, error.attempt):
        return error.attempt, error.rank
    return newest if choice.attempt is None else choice.attempt, choice.rank or 0
