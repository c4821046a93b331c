"""The mean of a complete run's last checkpoints, beside them: ``checkpoints/average-<last step>``."""

from __future__ import annotations

import logging

from encdec import distributed
from encdec.checkpoints import CheckpointManager
from encdec.checkpoints.averaging import average, choose_sources
from encdec.errors import EncdecError

log = logging.getLogger("encdec.train")


def average_last(checkpoints: CheckpointManager, last: int, step: int) -> None:
    """Rank 0 averages the last scheduled checkpoints, however long it takes; the others wait.

    Once in a run's life: what is there already is left alone. What stands in its way is told and ends no run, which is
    complete without it.

    Args:
        checkpoints: their manager, with none in flight.
        last: how many; nothing is done for fewer than two.
        step: the run's last.
    """
    if last >= 2:
        distributed.on_rank_zero_however_long(lambda: _make(checkpoints, last, step))


def _make(checkpoints: CheckpointManager, last: int, step: int) -> None:
    out = checkpoints.output_dir / f"average-{step}"
    if out.exists():
        return
    try:
        sources, passed_over = choose_sources(checkpoints.output_dir, last)
        for error in passed_over:
            log.warning("passed over for the average: %s", error)
        average(sources, out)
    except (EncdecError, OSError) as error:
        log.warning("the run has no average of its last checkpoints: %s", error)
        return
    log.info("%s: mean of %s", out.name, ", ".join(source.folder.name for source in sources))
