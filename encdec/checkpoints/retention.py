"""Which checkpoints may go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from encdec.checkpoints.catalog import CheckpointInfo


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What is kept: ``limit`` checkpoints, and more only where one that must stay is among the others.

    The newest, the best and the one just committed always stay, and those that the average at the end needs.
    """

    limit: int
    averaged: int = 0
    """How many of the last scheduled checkpoints the average at the end takes."""
    averaged_from: int = 0
    """First step that can be among them; 0 where the end is not known."""

    def spare(
        self, infos: Sequence[CheckpointInfo], best: CheckpointInfo | None, committed_step: int
    ) -> list[CheckpointInfo]:
        """Those that may go, first those that no schedule asked for, the oldest first.

        Args:
            infos: committed checkpoints, by step.
            committed_step: of the one just committed. It need not be the newest: a run that went on from further back
                may have left newer ones that it could not read.
        """
        needed = {committed_step, *(info.step for info in infos[-1:])}
        needed |= {best.step} if best else set()
        if self.averaged:
            scheduled = [info.step for info in infos if info.scheduled and info.step <= committed_step]
            needed |= {step for step in scheduled[-self.averaged :] if step >= self.averaged_from}
        dispensable = sorted(
            (info for info in infos if info.step not in needed), key=lambda info: (info.scheduled, info.step)
        )
        return dispensable[: max(0, len(infos) - self.limit)]
