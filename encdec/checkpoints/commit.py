"""From a snapshot to a committed checkpoint.

A save goes to ``step-<k>.tmp-<attempt>``; every rank syncs and hashes its own files; rank 0 writes the manifest,
renames the folder and syncs the parent. A kill at any point leaves the previous checkpoint as the newest valid one.
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
from typing import Any

import torch

from encdec import distributed, files
from encdec.checkpoints import folders
from encdec.checkpoints.manifest import (
    TRAINER_STATE,
    FileRecord,
    Manifest,
    hash_file,
    verify_names,
    write_manifest,
)
from encdec.checkpoints.payload import Snapshot
from encdec.distributed import Group


@dataclass(frozen=True, kw_only=True)
class Draft:
    """All that a checkpoint will hold, as of its step boundary; nothing of it changes while training goes on."""

    step: int
    state: dict[str, Any]
    """The trainer state, plain JSON values."""
    metrics: dict[str, float]
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
            OSError: a rank could not write (the previous checkpoint is untouched); on every rank.
            FencedError: a newer attempt exists; on every rank.
        """
        final = self.root / f"step-{draft.step}"
        temporary = self.root / f"{final.name}.tmp-{self.attempt}"
        distributed.on_rank_zero(lambda: folders.make_empty(temporary, draft.sharding), group)
        parts = distributed.together(lambda: self._write_own(temporary, draft, group), group)
        manifest = Manifest(
            step=draft.step,
            samples_consumed=int(draft.state.get("samples_consumed", 0)),
            world_size=distributed.world_size(),
            sharding=draft.sharding,
            attempt=self.attempt,
            run_identity=self.run_identity,
            metrics={name: value for name, value in draft.metrics.items() if math.isfinite(value)},
            versions={"python": platform.python_version(), "torch": torch.__version__},
            time=time.time(),
            files=sorted((record for part in parts for record in part), key=lambda record: record.path),
        )
        distributed.on_rank_zero(lambda: self._rename(temporary, final, manifest), group)

    @staticmethod
    def _write_own(temporary: Path, draft: Draft, group: Group) -> list[FileRecord]:
        """Write this rank's files (rank 0 also those that belong to nobody); their records."""
        written = draft.snapshot.write(temporary / draft.sharding, group)
        records = [dataclasses.replace(record, path=f"{draft.sharding}/{record.path}") for record in written]
        if distributed.rank() == 0:
            path = temporary / TRAINER_STATE
            files.atomic_write_json(path, draft.state)
            path.chmod(0o600)
            records.append(hash_file(temporary, path))
        return records

    def _rename(self, temporary: Path, final: Path, manifest: Manifest) -> None:
        write_manifest(temporary, manifest)
        verify_names(temporary, manifest)
        self.fence()
        # the same step again: with metrics that were still owed, or after a resume from further back
        replaced = folders.set_aside(final, "replaced") if final.exists() else None
        os.rename(temporary, final)
        files.fsync_directory(self.root)
        if replaced:
            folders.delete(replaced)
