"""Checkpoints that verify: manifest, payload, manager. ``python -m encdec.checkpoints --help`` for the commands."""

from encdec.checkpoints.manager import TRAINER_STATE, CheckpointInfo, CheckpointManager, logical_digest
from encdec.checkpoints.manifest import reading

__all__ = ["TRAINER_STATE", "CheckpointInfo", "CheckpointManager", "logical_digest", "reading"]
