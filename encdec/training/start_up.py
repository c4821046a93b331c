"""How far a start has come: a line in the ledger as each part of it is done, by which its time is told apart."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from encdec.records import START_UP, JsonLinesWriter, event


class StartUp:
    """Marks of one start of rank 0; the other ranks, which wait for it and for each other, leave none.

    A mark is not worth a run: one that storage refuses is left out, and what needs the storage will tell.

    Args:
        ledger: None: not known yet; marks are kept until ``tell`` names it.
    """

    def __init__(self, ledger: Path | None) -> None:
        self._leads = os.environ.get("RANK", "0") == "0"
        self._restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._ledger = ledger
        self._kept: list[dict[str, Any]] = []

    def done(self, part: str) -> None:
        """``part`` (imports, load or rendezvous) ends now; what comes now is another one's."""
        self._kept.append(event(START_UP, done=part, restart=self._restart))
        if self._ledger is not None:
            self.tell(self._ledger)

    def tell(self, ledger: Path) -> None:
        """From now on into this ledger, and what has been kept."""
        self._ledger, marks = ledger, self._kept
        self._kept = []
        if self._leads:
            with contextlib.suppress(OSError), JsonLinesWriter(ledger) as writer:
                for mark in marks:
                    writer.write(mark)
