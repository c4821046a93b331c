"""Checkpoints that verify: manifest, payload, manager. ``python -m encdec.checkpoints --help`` for the commands."""

from encdec.checkpoints.catalog import CheckpointInfo
from encdec.checkpoints.manager import CheckpointManager, logical_digest
from encdec.checkpoints.manifest import TRAINER_STATE, reading

__all__ = ["TRAINER_STATE", "CheckpointInfo", "CheckpointManager", "logical_digest", "reading"]
