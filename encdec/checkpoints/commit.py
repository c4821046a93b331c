"""From a snapshot to a committed checkpoint.

A save goes to ``step-<k>.tmp-<attempt>``; every rank writes and hashes its own files; rank 0 writes the manifest;
every rank syncs its own files; rank 0 renames the folder and syncs the parent. A kill at any point leaves the previous
checkpoint as the newest valid one.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from encdec import distributed, files
from encdec.checkpoints import folders, space
from encdec.checkpoints.manifest import (
    MANIFEST,
    TRAINER_STATE,
    FileRecord,
    Manifest,
    verify_names,
    write_hashed,
    write_manifest,
)
from encdec.checkpoints.payload import Snapshot
from encdec.distributed import Group
from encdec.errors import EncdecError


@dataclass(frozen=True, kw_only=True)
class Draft:
    """All that a checkpoint will hold, as of its step boundary; nothing of it changes while training goes on."""

    step: int
    samples_consumed: int
    state: str
    """The trainer state as JSON."""
    metrics: dict[str, float]
    scheduled: bool
    """Whether the schedule of steps asked for it, so that every run like this one has it."""
    sharding: str
    """Name of the payload."""
    snapshot: Snapshot


@dataclass(frozen=True, kw_only=True)
class Committer:
    """Writes drafts into a folder of checkpoints on behalf of one attempt.

    Args:
        root: folder that holds the ``step-<k>`` folders.
        attempt: number of the attempt that writes; part of the temporary folder's name.
        run_identity: digest of the configuration, recorded in the manifest.
        fence: called on rank 0 just before a commit; raises if this attempt may no longer write.
    """

    root: Path
    attempt: int
    run_identity: str
    fence: Callable[[], None]

    def commit(self, draft: Draft, group: Group = None) -> None:
        """Write and commit one checkpoint; collective over ``group``.

        Raises:
            OSError: a rank could not write; on every rank. The previous checkpoint is untouched, of this one nothing
                is left.
            FencedError: a newer attempt exists; on every rank.
        """
        temporary = self.root / f"step-{draft.step}.tmp-{self.attempt}"
        try:
            self._write(temporary, draft, group)
        except (OSError, EncdecError):  # all ranks are here: the error is every rank's
            distributed.on_rank_zero(lambda: folders.delete(temporary), group)
            raise

    def _write(self, temporary: Path, draft: Draft, group: Group) -> None:
        def prepare() -> None:
            ranks = distributed.world_size()
            space.require_room(self.root, draft.snapshot.nbytes * ranks, ranks)  # rank 0's share is the largest
            folders.make_empty(temporary, draft.sharding)

        distributed.on_rank_zero(prepare, group)
        parts = distributed.together(lambda: self._write_own(temporary, draft, group), group)
        manifest = Manifest(
            step=draft.step,
            samples_consumed=draft.samples_consumed,
            world_size=distributed.world_size(),
            sharding=draft.sharding,
            attempt=self.attempt,
            run_identity=self.run_identity,
            scheduled=draft.scheduled,
            metrics={name: value for name, value in draft.metrics.items() if math.isfinite(value)},
            versions={"python": platform.python_version(), "torch": torch.__version__},
            time=time.time(),
            files=sorted((record for part in parts for record in part), key=lambda record: record.path),
        )
        own = [temporary / record.path for record in parts[distributed.rank()]]
        distributed.together(lambda: self._seal(temporary, own, manifest), group)
        distributed.on_rank_zero(lambda: self._rename(temporary, manifest), group)

    @staticmethod
    def _write_own(temporary: Path, draft: Draft, group: Group) -> list[FileRecord]:
        """Write this rank's files (rank 0 also those that belong to nobody); their records."""
        written = draft.snapshot.write(temporary / draft.sharding, group)
        records = [dataclasses.replace(record, path=f"{draft.sharding}/{record.path}") for record in written]
        if distributed.rank() == 0:
            records.append(write_hashed(temporary / TRAINER_STATE, memoryview(draft.state.encode())))
        return records

    @staticmethod
    def _seal(temporary: Path, own: list[Path], manifest: Manifest) -> None:
        """Make this rank's files and their names durable; on rank 0 also the manifest."""
        if distributed.rank() == 0:
            write_manifest(temporary, manifest)
            own = [*own, temporary / MANIFEST]
        above = {folder for path in own for folder in path.parents if folder.is_relative_to(temporary)}
        files.fsync_together([*own, *above])

    def _rename(self, temporary: Path, manifest: Manifest) -> None:
        final = self.root / f"step-{manifest.step}"
        verify_names(temporary, manifest)
        self.fence()
        # the same step again: with metrics that were still owed, or after a resume from further back
        replaced = folders.set_aside(final, "replaced") if final.exists() else None
        os.rename(temporary, final)
        files.fsync_directory(self.root)
        if replaced:
            folders.delete(replaced)
