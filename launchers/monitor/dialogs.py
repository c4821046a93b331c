"""The question before a run is changed."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import Static

from launchers.monitor.acts import MEANS, Verb
from launchers.monitor.words import printable
from launchers.views.overview import RunView


class Confirmation(ModalScreen[bool]):
    """Nothing happens but at ``y``.

    Args:
        verb: what is about to be done.
        view: to which run.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,q,enter", "answer(False)", "no"),
    ]

    def __init__(self, verb: Verb, view: RunView) -> None:
        super().__init__()
        self._verb, self._view = verb, view

    def compose(self) -> ComposeResult:
        text = Text()
        text.append(f"{self._verb} {printable(self._view.name)}?", style="bold")
        text.append(f"\n{printable(self._view.standing.words)}\n\n{MEANS[self._verb]}\n\n")
        text.append("y yes   n no", style="bold")
        yield Static(text, id="question")

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)
