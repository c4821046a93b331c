"""Which checkpoints stay, and whether there is room for one more."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from encdec.checkpoints import CheckpointInfo, CheckpointManager, space
from encdec.checkpoints.retention import Retention
from tests.encdec.checkpoints.damage import Lab


def infos(*steps: int, extra: tuple[int, ...] = ()) -> list[CheckpointInfo]:
    return [CheckpointInfo(f"step-{step}", step, {}, 10, 0.0, scheduled=step not in extra) for step in steps]


def dropped(found: list[CheckpointInfo], committed: int, best: int | None = None, **rules: int) -> list[int]:
    chosen = next((info for info in found if info.step == best), None)
    return [info.step for info in Retention(**rules).spare(found, chosen, committed)]


def test_the_oldest_go_but_neither_the_newest_nor_the_best():
    assert dropped(infos(1, 2, 3, 4), 4, limit=2) == [1, 2]
    assert dropped(infos(1, 2, 3, 4), 4, best=1, limit=2) == [2, 3]
    assert dropped(infos(1, 2), 2, best=1, limit=1) == []


def test_the_one_just_committed_stays_beside_newer_ones_that_could_not_be_read():
    assert dropped(infos(50, 60, 100), 60, limit=1) == [50]


def test_what_nobody_scheduled_goes_first():
    assert dropped(infos(10, 15, 20, 25, extra=(15, 25)), 25, limit=3) == [15]
    assert dropped(infos(10, 15, 20, 25, extra=(15, 25)), 25, limit=2) == [15, 10]


def test_those_of_the_average_stay():
    found = infos(10, 20, 25, 30, 40, 50, 55, extra=(25, 55))
    assert dropped(found, 55, limit=1, averaged=3) == [25, 10, 20]
    assert dropped(found, 55, limit=1, averaged=3, averaged_from=45) == [25, 10, 20, 30, 40]
    assert dropped(found, 55, limit=1) == [25, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_order_of_steps_and_metrics_drops_what_must_stay(limit: int):
    for steps in itertools.combinations(range(0, 60, 10), 4):
        for best in steps:
            found = infos(*steps, extra=steps[1:2])
            gone = dropped(found, steps[-2], best=best, limit=limit, averaged=2)
            needed = {steps[-1], steps[-2], best, *[s for s in steps[:-1] if s != steps[1]][-2:]}
            assert not needed & set(gone)
            assert len(found) - len(gone) >= min(limit, len(found))


def test_average_of_a_run_keeps_its_checkpoints(tmp_path: Path):
    manager, lab = CheckpointManager(tmp_path, save_total_limit=1, averaged=3), Lab()
    for loss in (1.0, 5.0, 4.0, 3.0, 2.0, 2.5):
        lab.step()
        lab.save(manager, {"loss": loss})
    assert [info.step for info in manager.list_checkpoints()] == [1, 4, 5, 6]


def test_room_is_counted_in_bytes_and_inodes(tmp_path: Path, mounts: Callable[..., None]):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounts("-t", "tmpfs", "-o", "size=1m,nr_inodes=20", "tmpfs", str(disk))
    missing = disk / "not" / "yet"
    space.require_room(missing, 500_000, 2)
    for nbytes, files, reason in ((2_000_000, 2, "bytes needed"), (1000, 30, "inodes needed")):
        with pytest.raises(OSError, match=reason) as caught:
            space.require_room(missing, nbytes, files)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(missing))


def test_save_without_room_writes_nothing(tmp_path: Path, mounts: Callable[..., None]):
    mounts("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path))
    manager, lab = CheckpointManager(tmp_path / "checkpoints"), Lab()
    lab.step()
    with pytest.raises(OSError, match="bytes needed"):
        lab.save(manager)
    assert not (tmp_path / "checkpoints").exists()
