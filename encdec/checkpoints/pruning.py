"""Which checkpoints of a run may go by a person's wish, which stay, and why: looked at first, deleted afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from encdec.checkpoints import catalog, folders
from encdec.checkpoints.catalog import CheckpointInfo
from encdec.checkpoints.manager import CheckpointManager
from encdec.checkpoints.manifest import verify
from encdec.errors import CheckpointError, UnreadableCheckpoint

DEFAULT_AVERAGED = 5
"""Step checkpoints that an average takes by default."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one checkpoint."""

    checkpoint_id: str
    stays: bool
    why: str
    bytes: int
    """As its manifest says; 0 where that cannot be read."""


@dataclass(frozen=True)
class Examined:
    """A step folder and what was found when its files were read."""

    checkpoint_id: str
    info: CheckpointInfo | None
    """None: there is no sound manifest."""
    fault: CheckpointError | None
    """Why it is not valid; None where every digest matched, or where it was not read because nothing depends on it."""


def judge(examined: Sequence[Examined], best: CheckpointInfo | None, keep: int, averaged: int) -> list[Verdict]:
    """Pure: a verdict for each, in the order given.

    Args:
        examined: all step checkpoints, oldest first.
        best: the one with the best metric.
        keep: newest valid checkpoints to keep; at least 1.
        averaged: newest valid ones of the schedule that an average needs; 0: none.
    """
    reasons: dict[str, str] = {}
    valid = [one for one in reversed(examined) if one.fault is None]
    scheduled = [one.checkpoint_id for one in valid if one.info and one.info.scheduled]
    for place, one in enumerate(valid):
        if place == 0:
            reasons[one.checkpoint_id] = "the last valid one"
        elif place < keep:
            reasons[one.checkpoint_id] = f"one of the newest {keep}"
        elif one.checkpoint_id in scheduled[:averaged]:
            reasons[one.checkpoint_id] = f"the average of the last {averaged} needs it"
    if best:
        reasons.setdefault(best.checkpoint_id, "the best")
    verdicts = []
    for one in examined:
        why = reasons.get(one.checkpoint_id) or _why_not_touched(one)
        size = one.info.bytes if one.info else 0
        verdicts.append(Verdict(one.checkpoint_id, bool(why), why or f"older than the newest {keep}", size))
    return verdicts


def _why_not_touched(one: Examined) -> str:
    if one.fault is None:
        return ""
    if isinstance(one.fault, UnreadableCheckpoint):
        return f"cannot be read, so nothing is known about it ({one.fault.found})"
    return f"does not verify, which the next start of the run looks into ({one.fault.rule}, found {one.fault.found})"


def examine(
    manager: CheckpointManager, keep: int, averaged: int, progress: Callable[[int], None] = lambda count: None
) -> list[Examined]:
    """Read what may have to stay: the newest ``keep`` that verify, as many as an average needs of the schedule's, and
    the best one; older ones are only listed.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    infos = {info.checkpoint_id: info for info in manager.list_checkpoints()}
    best = best_of(manager)
    examined: list[Examined] = []
    verified = of_schedule = 0
    for step in reversed(folders.committed_steps(manager.output_dir)):
        name = f"step-{step}"
        folder, info, fault = manager.output_dir / name, infos.get(name), None
        may_be_averaged = info is not None and info.scheduled and of_schedule < averaged
        if verified < keep or may_be_averaged or info is None or (best and best.checkpoint_id == name):
            fault = _fault_of(folder, progress)
            verified += fault is None
            of_schedule += fault is None and info is not None and info.scheduled
        examined.append(Examined(name, info, fault))
    return examined[::-1]


def best_of(manager: CheckpointManager) -> CheckpointInfo | None:
    """The checkpoint that ``load_best`` would load."""
    return catalog.best(manager.list_checkpoints(), manager.best_metric, manager.best_metric_mode)


def _fault_of(folder: Path, progress: Callable[[int], None]) -> CheckpointError | None:
    try:
        verify(folder, progress)
    except CheckpointError as error:
        return error
    return None


def prune(
    manager: CheckpointManager,
    keep: int,
    *,
    averaged: int = DEFAULT_AVERAGED,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Verdict]:
    """Delete what may go; what each verdict says has been done when this returns, unless ``dry_run``.

    Raises:
        CheckpointError: none of them verifies: then none is deleted.
        OSError: storage does not let one be renamed.
    """
    examined = examine(manager, max(keep, 1), averaged, progress)
    if examined and all(one.fault for one in examined):
        raise CheckpointError(
            f"One checkpoint in {manager.output_dir} must verify before any is deleted",
            found=f"{len(examined)}, the newest of which: {str(examined[-1].fault).removesuffix('.')}",
            remedy="Mend that first",
        )
    verdicts = judge(examined, best_of(manager), keep, averaged)
    for verdict in verdicts:
        if not verdict.stays and not dry_run:
            folders.discard(manager.output_dir / verdict.checkpoint_id)
    return verdicts
