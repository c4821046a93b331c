"""What the monitor's keys do to a run: each is asked for and confirmed first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from encdec.errors import EncdecError
from encdec.files import RunPaths
from launchers import control
from launchers.views.overview import RunView


class Verb(StrEnum):
    """What can be done to a run."""

    CANCEL = "cancel"
    REQUEUE = "requeue"
    SAVE = "save"


MEANS = {
    Verb.CANCEL: "It finishes its step, saves and ends; nothing continues it by itself. One that waits never starts.",
    Verb.REQUEUE: "It finishes its step, saves and starts again; one that waits starts as soon as there is room.",
    Verb.SAVE: "It saves at its next step boundary and goes on.",
}


@dataclass(frozen=True)
class Said:
    """What became of it."""

    words: str
    done: bool


def act(verb: Verb, view: RunView) -> Said:
    """Do it; an error meant for a user is an answer, too."""
    paths = RunPaths(Path(view.directory))
    deeds: dict[Verb, Callable[[], Sequence[str]]] = {
        Verb.CANCEL: lambda: control.cancel(paths, now=False),
        Verb.REQUEUE: lambda: [control.requeue(paths, now=False, remedy=view.instead_of_requeue)],
        Verb.SAVE: lambda: [control.save(paths)],
    }
    try:
        words = deeds[verb]() or [f"nothing of it is live: {view.standing.words}"]
    except EncdecError as error:
        return Said(f"{view.name}: {error}", False)
    return Said(f"{view.name}: {'; '.join(words)}", True)
