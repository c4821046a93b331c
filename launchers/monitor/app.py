"""The live view: a table of runs, the chosen one in a few lines below it, and a key for what can be done to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Static

from launchers.monitor import columns, words
from launchers.monitor.acts import Said, Verb, act
from launchers.monitor.background import in_background
from launchers.monitor.dialogs import Confirmation
from launchers.monitor.observatory import Board, Observatory, Sight
from launchers.monitor.run_screen import RunScreen
from launchers.monitor.style import STYLE
from launchers.views.overview import RunView

SECONDS_BETWEEN_LOOKS = 2.0
"""At run directories."""
SECONDS_TO_ANSWER = 10.0
"""After which run directories that are still being read are said not to answer."""
SECONDS_OF_A_MESSAGE = 15.0
COLUMN = "runs"
"""Key of the table's one column."""
KEYS = "enter open  c cancel  r requeue  s save now  q quit"


class Runs(DataTable[Text]):
    """The table; first and last run at one key each."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("home,g", "scroll_top", "first"),
        Binding("end,G", "scroll_bottom", "last"),
        Binding("j", "cursor_down", "next"),
        Binding("k", "cursor_up", "before"),
    ]


class Monitor(App[None]):
    """All runs.

    Args:
        observatory: what looks at them.
        on_its_own: look again and again; else only when told to (``show``).
    """

    ENABLE_COMMAND_PALETTE = False
    TITLE = "launchers.monitor"
    CSS = STYLE
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("c", "act('cancel')", "cancel"),
        Binding("r", "act('requeue')", "requeue"),
        Binding("s", "act('save')", "save now"),
    ]

    def __init__(self, observatory: Observatory, *, on_its_own: bool = True) -> None:
        super().__init__()
        self._observatory, self._on_its_own = observatory, on_its_own
        self._leaving = False
        self._look_began: float | None = None
        """Of the look that is under way, by the monotonic clock."""
        self._rows: dict[str, Text] = {}
        self._columns: columns.Fitting = ()
        self.board: Board | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Runs(id="runs", cursor_type="row", cell_padding=0)
        yield Static(id="none")
        yield Static(id="details")
        yield Static(Text(KEYS), id="keys")

    def on_mount(self) -> None:
        if self._on_its_own:
            self.set_interval(SECONDS_BETWEEN_LOOKS, self.look)
            self.look()

    # ---- look

    def look(self) -> None:
        """Read the run directories, and ask Slurm if it is time, beside the screen; two looks never overlap.

        A file system that hangs holds a look up for long: the head says so.
        """
        if self._look_began is not None:
            self._show_head()
            return
        self._look_began = time.monotonic()
        in_background(self, self._observatory.look, self._looked)

    def _looked(self, board: Board) -> None:
        self._look_began = None
        if self._leaving:
            return
        self.show(board)
        in_background(self, self._observatory.ask_slurm, self._asked)

    def _asked(self, asked: bool) -> None:
        if asked:
            self.look()

    def show(self, board: Board) -> None:
        """Put a board on the screens."""
        self.board = board
        self._show_head()
        self._show_rows()
        self._show_details()
        for screen in self.screen_stack:
            if isinstance(screen, RunScreen):
                screen.show(board)

    def on_resize(self, event: events.Resize) -> None:
        if self.board is not None:
            self.call_after_refresh(self.show, self.board)

    # ---- show

    def _base(self) -> DataTable[Text]:
        return self.screen_stack[0].query_one("#runs", DataTable)

    def _show_head(self) -> None:
        waited = 0.0 if self._look_began is None else time.monotonic() - self._look_began
        silence = words.silence_line(self.board, waited) if waited > SECONDS_TO_ANSWER else ""
        head = Text(no_wrap=True, overflow="ellipsis")
        if silence:
            head.append(silence, style="bold red")
        elif self.board is not None:
            self._append_totals(head, self.board)
        self.screen_stack[0].query_one("#head", Static).update(head)
        for screen in self.screen_stack:
            if isinstance(screen, RunScreen):
                screen.show_silence(silence)

    def _append_totals(self, head: Text, board: Board) -> None:
        trouble = board.trouble or board.slurm_problem
        head.append(words.total_line(board), style="bold")
        head.append(f"   {words.slurm_line(board)}", style="bold red" if board.slurm_problem else "dim")
        head.append(f"   {words.states_line(board)}")
        if trouble:
            head.append(f": {words.printable(trouble)}", style="red")

    def _show_rows(self) -> None:
        """Only what has changed is put on the screen anew."""
        assert self.board is not None
        table, none = self._base(), self.screen_stack[0].query_one("#none", Static)
        wanted = columns.fitting(self.size.width - 1)  # the last column is the scroll bar's
        rows = columns.rows_of(self.board, wanted)
        none.display = not rows
        table.display = bool(rows)
        none.update("no runs here yet: python -m launchers.submit starts one, --root DIR looks elsewhere")
        if wanted != self._columns or list(rows) != list(self._rows):
            self._build(table, wanted, rows)
        else:
            for key, row in rows.items():
                if row != self._rows[key]:
                    table.update_cell(key, COLUMN, row)
        self._rows, self._columns = rows, wanted

    def _build(self, table: DataTable[Text], wanted: columns.Fitting, rows: dict[str, Text]) -> None:
        chosen = self._chosen_key()
        table.clear(columns=True)
        table.add_column(columns.header_of(wanted), key=COLUMN)
        for key, row in rows.items():
            table.add_row(row, key=key)
        if chosen in rows:
            table.move_cursor(row=list(rows).index(chosen), animate=False)

    def _show_details(self) -> None:
        assert self.board is not None
        sight, shown = self.chosen(), self.screen_stack[0].query_one("#details", Static)
        shown.display = sight is not None
        if sight is not None:
            shown.border_title = Text(words.printable(sight.view.name))
            shown.update(columns.details_text(sight, self.board.now, self.size.width))

    async def action_quit(self) -> None:
        self._leaving = True  # what is still being read finds no screen any more
        await super().action_quit()

    # ---- choose and act

    def _chosen_key(self) -> str | None:
        keys, row = list(self._rows), self._base().cursor_row
        return keys[row] if 0 <= row < len(keys) else None

    def chosen(self) -> Sight | None:
        """The run that the keys are about."""
        screen = self.screen_stack[-1]
        key = screen.directory if isinstance(screen, RunScreen) else self._chosen_key()
        sights = self.board.sights if self.board else ()
        return next((sight for sight in sights if sight.view.directory == key), None)

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        if self.board is not None:
            self._show_details()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        sight = self.chosen()
        if sight is not None and self.board is not None:
            self.push_screen(RunScreen(sight.view.directory, self.board))

    def action_act(self, verb: str) -> None:
        """Ask, then do it."""
        sight = self.chosen()
        if sight is not None and not isinstance(self.screen, Confirmation):
            self.push_screen(Confirmation(Verb(verb), sight.view), self._doing(Verb(verb), sight.view))

    def _doing(self, verb: Verb, view: RunView) -> Callable[[bool | None], None]:
        def do(agreed: bool | None) -> None:
            if agreed:
                in_background(self, lambda: act(verb, view), self._said, must_end=True)

        return do

    def _said(self, said: Said) -> None:
        if self._leaving:
            return
        self.notify(
            words.printable(said.words),
            severity="information" if said.done else "error",
            timeout=SECONDS_OF_A_MESSAGE,
            markup=False,
        )
        if self._on_its_own:
            self.look()
