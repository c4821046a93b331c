"""One run: how it fares, its first error, and its events or a rank's log, followed and filtered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Input, RichLog, Static

from encdec.files import RunPaths
from launchers.monitor import columns, words
from launchers.monitor.background import in_background
from launchers.monitor.observatory import Board, Sight
from launchers.monitor.run_reader import Choice, News, RunReader

MOST_LINES = 5000
"""Kept of what is shown."""
LINES_OF_A_LOW_SCREEN = 30
LEAST_LINES_OF_AN_ERROR = 2
"""Shown on a low screen; the last ones say most."""
LINES_ON_A_LOW_SCREEN = ("state", "phase", "alerts")
"""Of what is known of the run: the lines below it say more."""
KEYS = "e events  l log  [ ] rank  < > attempt  / filter  f follow  c r s  esc back"


class RunScreen(Screen[None]):
    """One run.

    Args:
        directory: of the run.
        board: what is known of all of them.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "back", "back"),
        Binding("e", "events", "events"),
        Binding("l", "log", "log"),
        Binding("left_square_bracket", "rank(-1)", "rank before"),
        Binding("right_square_bracket", "rank(1)", "next rank"),
        Binding("less_than_sign", "attempt(-1)", "attempt before"),
        Binding("greater_than_sign", "attempt(1)", "next attempt"),
        Binding("slash", "filter", "filter"),
        Binding("f", "follow", "follow"),
    ]

    def __init__(self, directory: str, board: Board) -> None:
        super().__init__()
        self.directory = directory
        self._board = board
        self._reader = RunReader(RunPaths(Path(directory)))
        self._choice = Choice()
        self._news: News | None = None
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        self._pattern = ""
        self._looking = False
        self._open = False
        """Whether there is something to show it on: a board may come before or after."""

    def compose(self) -> ComposeResult:
        yield Static(id="details")
        yield Static(id="error")
        yield Static(id="what")
        yield RichLog(id="lines", max_lines=MOST_LINES, auto_scroll=True)
        yield Input(id="filter", placeholder="show only lines with ...", compact=True)
        yield Static(Text(KEYS, no_wrap=True, overflow="ellipsis"), id="keys")

    def on_mount(self) -> None:
        self.query_one("#error").display = False
        self.query_one("#filter").display = False
        self.query_one("#lines").focus()
        self._open = True
        self.show(self._board)

    # ---- look

    def show(self, board: Board) -> None:
        """Take up a board, and read on."""
        self._board = board
        if not self._open:
            return
        sight = self._sight()
        details = self.query_one("#details", Static)
        if sight is None:
            details.update(Text(f"it is gone: {words.printable(self.directory)}"))
            return
        details.border_title = Text(words.printable(sight.view.name))
        chosen = LINES_ON_A_LOW_SCREEN if self._low else None
        details.styles.height = len(chosen) + 2 if chosen else None
        details.update(columns.details_text(sight, board.now, self.app.size.width, chosen))
        self.look()

    def show_silence(self, words_of_it: str) -> None:
        """Say that run directories do not answer; nothing where they do."""
        if self._open:
            self.query_one("#details", Static).border_subtitle = Text(words_of_it, style="bold red")

    def look(self) -> None:
        """Read on, beside the screen; two looks never overlap."""
        if self._looking:
            return
        self._looking = True
        choice = self._choice
        in_background(self.app, lambda: self._reader.look(choice), self._looked)

    def _looked(self, news: News) -> None:
        self._looking = False
        if not self._open:
            return
        if news.choice != self._choice:
            self.look()  # another choice was made meanwhile
            return
        if news.anew:
            self._lines.clear()
            self._log.clear()
        self._news = news
        self._lines += news.lines
        self._write(news.lines)
        self._show_what()
        self._show_error()

    # ---- show

    @property
    def _log(self) -> RichLog:
        return self.query_one("#lines", RichLog)

    @property
    def _low(self) -> bool:
        return self.app.size.height < LINES_OF_A_LOW_SCREEN

    def _sight(self) -> Sight | None:
        return next((one for one in self._board.sights if one.view.directory == self.directory), None)

    def _write(self, lines: Iterable[str]) -> None:
        wanted = self._pattern.lower()
        for line in lines:
            if wanted in line.lower():
                self._log.write(Text(line, no_wrap=True))

    def _show_what(self) -> None:
        following = "following" if self._log.auto_scroll else "standing still (f follows)"
        matching = f", lines with {self._pattern!r}" if self._pattern else ""
        source = self._news.source if self._news else ""
        text = Text(f"{source}{matching}", style="bold", no_wrap=True, overflow="ellipsis")
        self.query_one("#what", Static).update(text.append(f"   {following}", style="dim"))

    def _show_error(self) -> None:
        panel, found = self.query_one("#error", Static), self._news.error if self._news else None
        panel.display = found is not None
        if found is None:
            return
        error = found.error
        lines = error.lines[-LEAST_LINES_OF_AN_ERROR:] if self._low else error.lines
        panel.border_title = f"first error: attempt {found.attempt}, rank {found.rank}"
        said = [words.printable(line) for line in (error.said, *lines)]
        panel.update(Text("\n".join(said), no_wrap=True, overflow="ellipsis"))

    # ---- choose

    def _choose(self, choice: Choice) -> None:
        if choice != self._choice:
            self._choice = choice
            self.look()

    def action_back(self) -> None:
        self._open = False
        self.dismiss()

    def action_events(self) -> None:
        self._choose(Choice())

    def action_log(self) -> None:
        """The log of the rank that failed first, where one has."""
        if not self._choice.log:
            self._choose(Choice(log=True))

    def action_rank(self, by: int) -> None:
        if self._news:
            rank = neighbour(self._reader.ranks(self._news.attempt), self._news.rank, by)
            self._choose(Choice(log=True, attempt=self._news.attempt, rank=rank))

    def action_attempt(self, by: int) -> None:
        there = self._reader.attempts()
        if self._news and self._news.attempt is not None and there:
            number = neighbour(there, self._news.attempt, by)
            newest = number == there[-1]  # and then the next one, too
            self._choose(Choice(log=True, attempt=None if newest else number, rank=self._news.rank))

    def action_follow(self) -> None:
        self._log.auto_scroll = not self._log.auto_scroll
        if self._log.auto_scroll:
            self._log.scroll_end(animate=False)
        self._show_what()

    # ---- filter

    def action_filter(self) -> None:
        entry = self.query_one("#filter", Input)
        entry.display = True
        entry.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._pattern = event.value
        event.input.display = False
        self._log.focus()
        self._log.clear()
        self._write(self._lines)
        self._show_what()


def neighbour(there: list[int], now: int, by: int) -> int:
    """The number before or after ``now`` among those that are there; ``now`` itself at either end."""
    beyond = [number for number in there if (number - now) * by > 0]
    return now if not beyond else min(beyond) if by > 0 else max(beyond)
