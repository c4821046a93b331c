"""Checkpoints that verify: manifest, payload, manager. ``python -m encdec.checkpoints --help`` for the commands."""

from encdec.checkpoints.manager import CheckpointInfo, CheckpointManager, logical_digest

__all__ = ["CheckpointInfo", "CheckpointManager", "logical_digest"]
