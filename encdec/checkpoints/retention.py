"""Which checkpoints may go."""

from __future__ import annotations

from collections.abc import Sequence

from encdec.checkpoints.catalog import CheckpointInfo


def spare(infos: Sequence[CheckpointInfo], best: CheckpointInfo | None, limit: int) -> list[CheckpointInfo]:
    """The oldest beyond ``limit``; never the newest, never the best.

    Args:
        infos: committed checkpoints, by step.
        limit: checkpoints to keep.
    """
    dispensable = [info for info in infos[:-1] if best is None or info.checkpoint_id != best.checkpoint_id]
    return dispensable[: max(0, len(infos) - limit)]
