"""Checkpoints that verify: manifest, payload, manager. ``python -m encdec.checkpoints --help`` for the commands."""

from encdec.checkpoints.catalog import CheckpointInfo
from encdec.checkpoints.drive import DriveCheckpointManager
from encdec.checkpoints.flight import Saved
from encdec.checkpoints.manager import CheckpointManager
from encdec.checkpoints.manifest import TRAINER_STATE, reading
from encdec.checkpoints.meaning import logical_digest

__all__ = [
    "TRAINER_STATE",
    "CheckpointInfo",
    "CheckpointManager",
    "DriveCheckpointManager",
    "Saved",
    "logical_digest",
    "reading",
]
