"""A disk that fills up while a checkpoint is written, at every stage of it: a real file system of a few pages."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from encdec.checkpoints import CheckpointManager, space
from tests.encdec.checkpoints.damage import Lab

PAGE = 4096
PAGES = 40
INODES = 24


@pytest.fixture
def small(tmp_path: Path, mounts: Callable[..., None]) -> Path:
    """A folder on a file system of PAGES pages and INODES inodes."""
    (tmp_path / "small").mkdir()
    mounts("-t", "tmpfs", "-o", f"size={PAGES * PAGE},nr_inodes={INODES}", "tmpfs", str(tmp_path / "small"))
    return tmp_path / "small"


def leave_pages(place: Path, pages: int) -> None:
    """Fill ``place`` up to so many free pages."""
    taken = os.statvfs(place).f_bavail - pages
    (place / "filler").write_bytes(bytes(max(0, taken) * PAGE))


def leave_inodes(place: Path, inodes: int) -> None:
    for number in range(os.statvfs(place).f_favail - inodes):
        (place / f"filler-{number}").touch()


LEAVE = {"pages": leave_pages, "inodes": leave_inodes}


def names(manager: CheckpointManager) -> list[str]:
    return sorted(path.name for path in manager.output_dir.iterdir())


def try_to_save(manager: CheckpointManager, lab: Lab, *, blocking: bool) -> OSError | None:
    try:
        manager.save(*lab.parts(), lab.schedule.step, blocking=blocking)
        manager.wait()
    except OSError as error:
        return error
    return None


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "beside training"])
@pytest.mark.parametrize("of", LEAVE)
def test_disk_that_fills_up_at_any_stage_of_a_save(small: Path, monkeypatch, of: str, blocking: bool):
    """Room is gone between the look at it and the writing, as it is where others write, too."""
    monkeypatch.setattr(space, "require_room", lambda root, nbytes, files: None)
    manager, lab = CheckpointManager(small / "checkpoints"), Lab()
    lab.step()
    lab.save(manager)
    lab.step()
    failed = 0
    for left in range(PAGES):
        LEAVE[of](small, left)
        error = try_to_save(manager, lab, blocking=blocking)
        for filler in small.glob("filler*"):
            filler.unlink()
        if error is None:
            break
        failed += 1
        assert error.errno == errno.ENOSPC
        assert Path(error.filename).is_relative_to(manager.output_dir)
        assert names(manager) == ["step-1"]
        assert manager.newest_valid() == manager.output_dir / "step-1" and manager.rejected == []
    assert failed >= 4  # the folders, the shard, its index, the state, the manifest
    assert names(manager) == ["step-1", "step-2"]
    assert manager.newest_valid() == manager.output_dir / "step-2"


def test_reason_that_finds_no_room_in_quarantine_keeps_nothing_from_going_on(small: Path):
    manager, lab = CheckpointManager(small / "checkpoints"), Lab()
    for _ in range(2):
        lab.step()
        lab.save(manager)
    with (manager.output_dir / "step-2" / "trainer_state.json").open("r+b") as stream:
        stream.write(b"?")
    leave_pages(small, 0)
    assert manager.newest_valid() == manager.output_dir / "step-1"
    [moved] = (manager.output_dir / "quarantine").iterdir()
    assert not (moved / "REASON").exists()
    assert "trainer_state.json" in manager.rejected[0]
