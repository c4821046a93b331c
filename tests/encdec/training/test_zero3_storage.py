"""ZeRO-3 checkpoints where storage is full, or in two places."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from encdec import distributed
from encdec.checkpoints import CheckpointManager, logical_digest, space
from encdec.checkpoints.mirror import Mirror
from tests.encdec.training.engine_lab import SAVED, Made, Scene
from tests.many_ranks import in_ranks

PAGE = 4096
LEFT = (0, 2, 20, 70, 110)
"""Free pages: for nothing, for folders, for part of a rank's file, for one rank's, for all but the last files."""


def test_disk_that_fills_up_at_any_stage_of_a_save_beside_training(
    made: Made, tmp_path: Path, mounts: Callable[..., None]
):
    (tmp_path / "small").mkdir()
    mounts("-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path / "small"))
    scene = Scene(made, "deepspeed", tmp_path / "small" / "checkpoints", 9)
    in_ranks(2, save_where_room_is_gone, scene)
    assert sorted(path.name for path in scene.root.iterdir()) == ["step-1", "step-2"]


def save_where_room_is_gone(scene: Scene) -> None:
    """Room is gone between the look at it and the writing, as it is where others write, too."""
    space.require_room = lambda root, nbytes, files: None
    trainer, filler = scene.trainer(), scene.root.parent / "filler"
    manager, parts = trainer.checkpoints, trainer._parts
    trainer._step()
    manager.save(*parts, 1)
    trainer._step()
    for left in LEFT:
        if distributed.rank() == 0:
            filler.write_bytes(bytes(PAGE * (os.statvfs(scene.root).f_bavail - left)))
        dist.barrier()
        with pytest.raises(OSError, match="No space left"):
            save_beside_training(manager, parts)
        dist.barrier()
        assert os.listdir(scene.root) == ["step-1"]
        assert manager.newest_valid() == scene.root / "step-1" and manager.rejected == []
        if distributed.rank() == 0:
            filler.unlink()
        dist.barrier()
    save_beside_training(manager, parts)
    assert manager.newest_valid() == scene.root / "step-2"


def save_beside_training(manager: CheckpointManager, parts: tuple[Any, ...]) -> None:
    manager.save(*parts, 2, blocking=False)
    manager.wait()


def test_mirror_has_and_gives_back_the_same(whole_run: Callable[[str], Scene], tmp_path: Path):
    saved = whole_run("deepspeed").root / f"step-{SAVED}"
    mirror = Mirror(tmp_path / "second")
    assert mirror.copy_in(saved).outcome == "copied"
    mirror.verify(SAVED)
    assert mirror.copy_out(SAVED, tmp_path / "back").outcome == "copied"
    assert logical_digest(tmp_path / "back" / saved.name) == logical_digest(saved)
