"""Checkpoints in two places: a fast folder that training writes, and a drive that is slow or elsewhere.

``infra.checkpoint_mirror`` makes a run use this manager: its ``checkpoints/`` are the cache, the mirror is the drive.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from encdec import distributed
from encdec.checkpoints import catalog
from encdec.checkpoints.background import BackgroundMirror, Report
from encdec.checkpoints.catalog import CheckpointInfo
from encdec.checkpoints.manager import CheckpointManager, Stateful
from encdec.checkpoints.mirror import Mirror
from encdec.errors import CheckpointError, MirrorError

log = logging.getLogger("encdec.train")
DRAIN_SECONDS, HURRIED_SECONDS = 30.0, 2.0
"""How long the end of training waits for the copy in flight; what it does not get done, the next start does."""


def _no_ledger(kind: str, **facts: Any) -> None:
    """Entries nobody keeps."""


class DriveCheckpointManager(CheckpointManager):
    """A ``CheckpointManager`` whose checkpoints also lie on shared storage that is slow or elsewhere.

    A save commits in the cache and is copied to the drive in the background. Loading takes the newest valid checkpoint
    of both, fetching it from the drive where the cache lacks it. Both places keep ``save_total_limit`` checkpoints.

    Args:
        drive_path: path (a mounted drive, NFS) or fsspec URL of a folder for these checkpoints alone.
        local_cache: folder that all ranks see.
        report: takes entries for the ledger: mirrored, mirror_failed, mirror_behind, restored.
        save_total_limit, ...: as ``CheckpointManager``.

    Raises:
        ConfigError: there can be no drive at ``drive_path``.
    """

    def __init__(
        self,
        drive_path: str | Path,
        local_cache: str | Path,
        save_total_limit: int = 3,
        *arguments: Any,
        report: Report = _no_ledger,
        **options: Any,
    ) -> None:
        super().__init__(local_cache, save_total_limit, *arguments, **options)
        self.mirror = Mirror(drive_path, hash_threads=1)
        self._report = report
        self._drive = BackgroundMirror(self.mirror, self._retain_on_drive, report)

    # ---- save

    def _after_commit(self, step: int) -> None:
        super()._after_commit(step)
        self._drive.submit(self.output_dir / f"step-{step}")

    def _retain_on_drive(self, copied_step: int) -> None:
        infos = self._on_drive()
        for info in self.retention.spare(infos, self._best(infos), copied_step):
            self.mirror.delete(info.step)
        with self.mirror.place.reached():
            self.mirror.place.delete_unfinished(before=copied_step)

    def drain(self, seconds: float = DRAIN_SECONDS) -> bool:
        """Wait for the copies to the drive; whether all are done."""
        return self._drive.drain(seconds)

    def close(self, *, hurried: bool = False) -> None:
        super().close(hurried=hurried)
        self.drain(HURRIED_SECONDS if hurried else DRAIN_SECONDS)

    # ---- find

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """Committed checkpoints of cache and drive with a sound manifest, by step.

        Raises:
            MirrorError: the drive does not answer.
        """
        infos = {info.step: info for info in self._on_drive()}
        infos |= {info.step: info for info in super().list_checkpoints()}
        return [infos[step] for step in sorted(infos)]

    def _on_drive(self) -> list[CheckpointInfo]:
        infos = map(catalog.described, self.mirror.manifests())
        return [info for info in infos if not self.withdrawn(info.step, info.samples_consumed)]

    def validate(self, checkpoint_id: str) -> None:
        """Verify one checkpoint in this process: the cache's, or else the drive's.

        Raises:
            CheckpointError: naming what is wrong.
            MirrorError: the drive does not answer.
        """
        if os.path.lexists(self.output_dir / checkpoint_id):
            super().validate(checkpoint_id)
        else:
            self.mirror.verify(int(checkpoint_id.removeprefix("step-")))

    def newest_valid(self) -> Path | None:
        """As ``CheckpointManager.newest_valid``, over both places; what only the drive has is fetched.

        Raises:
            CheckpointError: as there, if the drive has no valid one either.
            MirrorError: the cache has none, and the drive does not answer.
        """
        problem: CheckpointError | None = None
        try:
            folder = super().newest_valid()
        except CheckpointError as error:
            folder, problem = None, error
        newest = int(folder.name.removeprefix("step-")) if folder else -1
        fetched, rejected = distributed.on_rank_zero_however_long(lambda: self._fetch_newer_than(newest))
        self.rejected += rejected
        if fetched is not None:
            return self.output_dir / f"step-{fetched}"
        if problem:
            raise problem
        if folder and distributed.rank() == 0:
            self._drive.submit(folder)  # an earlier attempt may have ended before its copy
        return folder

    def _fetch_newer_than(self, step: int) -> tuple[int | None, list[str]]:
        """(the newest valid step of the drive after ``step``, now also in the cache; why newer ones were passed over).

        Raises:
            MirrorError: the drive does not answer, and there is nothing else to go on from.
        """
        rejected: list[str] = []
        try:
            with self.mirror.place.reached():
                steps = self.mirror.place.steps()
            for candidate in reversed([one for one in steps if one > step]):
                try:
                    if self._delete_withdrawn(candidate):
                        rejected.append(f"deleted from the drive: step-{candidate}, which a roll-back has withdrawn")
                        continue
                    self._fetch(candidate)
                    return candidate, rejected
                except CheckpointError as error:
                    rejected.append(f"left on the drive: {error}")
        except MirrorError as error:
            if step < 0:
                raise
            log.warning("%s", error)
        return None, rejected

    def _delete_withdrawn(self, step: int) -> bool:
        """Whether the drive's checkpoint of ``step`` was one that the run has withdrawn; it is gone then."""
        made = self.mirror.manifest(step)
        if not self.withdrawn(made.step, made.samples_consumed):
            return False
        self.mirror.delete(step)
        return True

    def _fetch(self, step: int) -> None:
        copied = self.mirror.copy_out(step, self.output_dir)
        log.warning("restored %s from the mirror %s", copied.checkpoint_id, self.mirror.place.name)
        self._report("restored", mirror=self.mirror.place.name, checkpoint=copied.checkpoint_id, bytes=copied.bytes)

    # ---- load

    def load(self, folder: Path, model: nn.Module, optimizer: Optimizer, scheduler: Stateful) -> dict[str, Any]:
        """As ``CheckpointManager.load``; a folder of the cache that only the drive has is fetched first."""
        distributed.on_rank_zero_however_long(lambda: self._fetch_missing(folder))
        return super().load(folder, model, optimizer, scheduler)

    def _fetch_missing(self, folder: Path) -> None:
        if folder.parent == self.output_dir and not os.path.lexists(folder):
            self._fetch(int(folder.name.removeprefix("step-")))
