"""What an engine does for a checkpoint: its payload, the one folder of a checkpoint whose format is the engine's own.

A save has two halves. ``Payload.snapshot`` copies and blocks training; ``Snapshot.write`` may run in another thread
while training goes on. Everything else about a checkpoint is the same for all engines and knows none of them.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Protocol

from blake3 import blake3
from torch import nn
from torch.optim import Optimizer

from encdec.checkpoints.manifest import FileRecord
from encdec.distributed import Group
from encdec.errors import CheckpointError

ENGINES = {"fsdp2": "encdec.checkpoints.fsdp2:Fsdp2Payload"}
"""Payload name, as manifests have it under ``sharding``, and its class; imported where it is used."""
DEFAULT = "fsdp2"


class Snapshot(Protocol):
    """The state of one step boundary in host memory; valid until the payload that made it makes the next one."""

    @property
    def nbytes(self) -> int:
        """About what ``write`` writes on this rank, bytes."""

    def write(self, folder: Path, group: Group = None) -> list[FileRecord]:
        """Write this rank's files into the empty ``folder``; collective over ``group``. The caller syncs them.

        Returns the records of the files that this rank wrote, by paths relative to ``folder``; over all ranks they are
        all files there. The files are readable by their owner alone. Called from any thread; uses no other group.

        Raises:
            OSError: storage took no more; on this rank alone only after its last collective.
        """


class Payload(Protocol):
    """Reads and writes one engine's payload."""

    name: str
    """Of the payload's folder in a checkpoint, and of the manifest's ``sharding``."""

    def snapshot(self, model: nn.Module, optimizer: Optimizer) -> Snapshot:
        """Copy all that has to survive into host buffers, which are reused from one snapshot to the next."""

    def load(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """Fill model and optimizer from a verified ``folder`` at any world size; collective.

        Raises:
            CheckpointError: it is of another model.
            UnreadableCheckpoint: storage does not let it be read.
        """

    def digest(self, folder: Path, hasher: blake3) -> None:
        """Feed the logical content of a verified ``folder`` to ``hasher``: the same bytes for any world size."""


def payload_named(name: str) -> Payload:
    """The payload of an engine.

    Raises:
        CheckpointError: no such engine is known.
    """
    if name not in ENGINES:
        raise CheckpointError(
            f"A checkpoint must be of an engine that is known here: {', '.join(ENGINES)}",
            found=name,
            remedy="Use the version that wrote it",
        )
    return pkgutil.resolve_name(ENGINES[name])()
