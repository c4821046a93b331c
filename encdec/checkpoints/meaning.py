"""What a checkpoint means: the plain values that training goes on from, and one digest of them and all tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blake3 import blake3

from encdec.checkpoints.manifest import TRAINER_STATE, reading, verify
from encdec.checkpoints.payload import payload_named


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The plain values of a verified checkpoint.

    Raises:
        CheckpointError: not JSON, or without a step and a scheduler.
    """
    with reading(folder / TRAINER_STATE, "step and scheduler"):
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        return {**state, "step": int(state["step"]), "scheduler": dict(state["scheduler"])}


def logical_digest(folder: Path) -> str:
    """64 hex digits of what a checkpoint means: model, optimizer, scheduler, data position, seed and step.

    The same for any sharding and world size. The checkpoint is verified first.

    Raises:
        CheckpointError: it does not verify.
    """
    sharding = verify(folder).sharding
    state = read_trainer_state(folder)
    hasher = blake3()
    payload_named(sharding).digest(folder / sharding, hasher)
    logical = {key: state.get(key) for key in ("scheduler", "samples_consumed", "seed", "step")}
    hasher.update(json.dumps(logical, sort_keys=True).encode())
    return hasher.hexdigest()
