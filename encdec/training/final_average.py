"""The mean of a complete run's last checkpoints, beside them: ``checkpoints/average-<last step>``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from encdec import distributed
from encdec.checkpoints import CheckpointManager, folders
from encdec.checkpoints.averaging import average, choose_sources
from encdec.checkpoints.manifest import Manifest, verify
from encdec.errors import CheckpointError, EncdecError, FencedError, UnreadableCheckpoint

log = logging.getLogger("encdec.train")
BY_HAND = "python -m encdec.checkpoints average makes one"


class Interrupted(EncdecError):
    """A stop was asked for meanwhile."""


def average_last(
    checkpoints: CheckpointManager, last: int, step: int, *, scheduled: int, stop_asked: Callable[[], bool]
) -> None:
    """Rank 0 averages the run's last scheduled checkpoints, however long it takes; the others wait.

    Once in a run's life. What stands in its way is told and ends no run, which is complete without it.

    Args:
        checkpoints: their manager, with none in flight.
        last: how many; nothing is done for fewer than two.
        step: the run's last.
        scheduled: how many the run has made by schedule, so that it is told if some are missing.
        stop_asked: looked at again and again; it leaves the run without an average.

    Raises:
        FencedError: a newer attempt exists.
    """
    wanted = min(last, scheduled)
    if wanted >= 2:
        distributed.on_rank_zero_however_long(lambda: _make(checkpoints, wanted, step, stop_asked))


def _make(checkpoints: CheckpointManager, wanted: int, step: int, stop_asked: Callable[[], bool]) -> None:
    out = checkpoints.output_dir / f"average-{step}"

    def look(count: int) -> None:
        if stop_asked():
            raise Interrupted("An average takes its time", found="a stop that was asked for", remedy=BY_HAND)

    def is_the_runs(manifest: Manifest) -> bool:
        return manifest.step <= step and checkpoints.is_own(manifest)

    try:
        if out.exists() and _is_whole(out):
            return
        sources, passed_over = choose_sources(checkpoints.output_dir, wanted, look, among=is_the_runs)
        for error in passed_over:
            log.warning("passed over for the average: %s", error)
        average(sources, out, look, before_commit=checkpoints.fence)
    except FencedError:
        raise
    except Exception as error:  # MemoryError among them
        log.warning("the run has no average of its last checkpoints: %s", error)
        return
    few = f", of {wanted} that the schedule has: {BY_HAND} of what a mirror has" if len(sources) < wanted else ""
    log.log(
        logging.WARNING if few else logging.INFO,
        "%s: mean of %s%s", out.name, ", ".join(source.folder.name for source in sources), few,
    )  # fmt: skip


def _is_whole(out: Path) -> bool:
    """Whether it verifies; what is proven wrong is deleted, to be made again."""
    try:
        verify(out)
        return True
    except UnreadableCheckpoint:
        raise
    except CheckpointError as error:
        log.warning("made again: %s", error)
        folders.delete(out)
        return False
