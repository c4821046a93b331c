"""DriveCheckpointManager: saves in a cache, copies in the background, loads from whichever place has the newest."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from encdec import distributed
from encdec.checkpoints import DriveCheckpointManager, logical_digest
from encdec.checkpoints.mirror import Mirror
from encdec.errors import CheckpointError, MirrorError
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.encdec.checkpoints.damage import Lab, flip, payload
from tests.encdec.checkpoints.ranks import ShardedLab, run_ranks


class Ledger:
    """Keeps the entries that it is told."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def __call__(self, kind: str, **facts: Any) -> None:
        self.entries.append({"event": kind, **facts})

    def kinds(self) -> list[str]:
        return [entry["event"] for entry in self.entries]


class Gate(MemoryFileSystem):
    """Storage elsewhere that answers only while its gate is open."""

    protocol = "gated"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    opened = threading.Event()

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode:
            assert self.opened.wait(PATIENCE_SECONDS)
        return super()._open(path, mode, **options)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    fsspec.register_implementation("gated", Gate, clobber=True)
    Gate.opened.clear()
    yield Gate.opened
    Gate.opened.set()


def saves(manager: DriveCheckpointManager, lab: Lab, count: int) -> None:
    for _ in range(count):
        lab.step()
        lab.save(manager)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def mirrored(tmp_path: Path, ledger: Ledger) -> tuple[DriveCheckpointManager, Lab]:
    """Steps 1, 2 and 3 in both places."""
    manager, lab = DriveCheckpointManager(tmp_path / "drive", tmp_path / "cache", report=ledger), Lab()
    for _ in range(3):
        saves(manager, lab, 1)
        assert manager.drain(PATIENCE_SECONDS)
    return manager, lab


def steps_on(drive: Path | str) -> list[int]:
    return [manifest.step for manifest in Mirror(drive).manifests()]


@pytest.mark.usefixtures("mirrored")
def test_both_places_have_what_was_saved(ledger: Ledger, tmp_path: Path):
    assert steps_on(tmp_path / "drive") == [1, 2, 3]
    assert ledger.kinds() == ["mirrored"] * 3
    assert ledger.entries[-1]["checkpoint"] == "step-3"
    assert ledger.entries[-1]["mirror"] == str(tmp_path / "drive")
    for step in (1, 2, 3):
        digests = {logical_digest(tmp_path / place / f"step-{step}") for place in ("cache", "drive")}
        assert len(digests) == 1


def test_lost_cache_comes_back(mirrored, ledger: Ledger, tmp_path: Path):
    _, lab = mirrored
    expected = [lab.step() for _ in range(3)]
    shutil.rmtree(tmp_path / "cache")
    other = Lab(seed=9)
    again = DriveCheckpointManager(tmp_path / "drive", tmp_path / "cache", report=ledger)
    assert [info.step for info in again.list_checkpoints()] == [1, 2, 3]
    again.validate("step-2")
    step, epoch, state = again.load_latest(*other.parts())
    assert (step, epoch, state["samples_consumed"]) == (3, 0, 24)
    assert [other.step() for _ in range(3)] == expected
    assert ledger.kinds()[-1] == "restored"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["step-3"]


def test_damage_in_the_cache_costs_no_step(mirrored, tmp_path: Path):
    manager, _ = mirrored
    flip(payload(tmp_path / "cache" / "step-3"))
    assert manager.load_latest(*Lab(seed=9).parts())[0] == 3
    assert "quarantine" in manager.rejected[0]
    manager.validate("step-3")


def test_damage_in_both_places_costs_one(mirrored, tmp_path: Path):
    manager, _ = mirrored
    for place in ("cache", "drive"):
        flip(payload(tmp_path / place / "step-3"))
    assert manager.load_latest(*Lab(seed=9).parts())[0] == 2
    assert [reason.split(":")[0] for reason in manager.rejected] == ["moved to quarantine", "left on the drive"]


def test_best_may_be_on_the_drive_alone(tmp_path: Path):
    manager, lab = DriveCheckpointManager(tmp_path / "drive", tmp_path / "cache", 2), Lab()
    for loss in (3.0, 1.0, 2.0, 2.5, 2.4):
        lab.step()
        lab.save(manager, {"loss": loss})
        assert manager.drain(PATIENCE_SECONDS)
    assert steps_on(tmp_path / "drive") == [2, 5]  # retention, there too
    shutil.rmtree(tmp_path / "cache" / "step-2")
    assert manager.load_best(*Lab(seed=3).parts())[0] == 2
    assert [info.step for info in manager.list_checkpoints()] == [2, 5]


def load_on_every_rank(folder: Path) -> None:
    """As one rank of ``run_ranks``: what it loaded goes to a file of its own."""
    distributed.SECONDS_BETWEEN_MEETINGS = 1e-4  # the ranks meet many times while rank 0 fetches
    manager, lab = DriveCheckpointManager(folder / "drive", folder / "cache"), ShardedLab()
    loaded = manager.load_latest(*lab.parts())
    assert loaded is not None
    lab.step()
    lab.save(manager)
    manager.close()
    (folder / f"rank-{distributed.rank()}").write_text(str(loaded[0]))


@pytest.mark.usefixtures("mirrored")
def test_ranks_restore_together(tmp_path: Path):
    shutil.rmtree(tmp_path / "cache")
    assert run_ranks(load_on_every_rank, tmp_path) == [0, 0]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    assert steps_on(tmp_path / "drive") == [2, 3, 4]
    alone = DriveCheckpointManager(tmp_path / "drive", tmp_path / "cache")
    assert alone.load_latest(*Lab(seed=9).parts())[0] == 4


def test_nothing_anywhere_means_none(tmp_path: Path):
    manager = DriveCheckpointManager(tmp_path / "drive", tmp_path / "cache")
    assert manager.load_latest(*Lab().parts()) is None
    assert manager.load_best(*Lab().parts()) is None


def test_drive_that_does_not_answer_is_a_warning_while_there_is_a_cache(tmp_path: Path, ledger: Ledger, caplog):
    (tmp_path / "file").write_text("in the way")
    manager, lab = DriveCheckpointManager(tmp_path / "file" / "drive", tmp_path / "cache", report=ledger), Lab()
    saves(manager, lab, 1)
    assert manager.drain(PATIENCE_SECONDS)
    assert ledger.kinds() == ["mirror_failed"]
    assert "not mirrored" in caplog.text
    assert manager.load_latest(*Lab().parts())[0] == 1


def test_run_does_not_start_over_because_its_drive_does_not_answer(tmp_path: Path, monkeypatch):
    """NotADirectoryError is what a path under a file gives; a drive that is away gives all kinds of OSError."""
    manager = DriveCheckpointManager(tmp_path / "drive", tmp_path / "cache")

    def away(*arguments: Any, **options: Any) -> None:
        raise ConnectionResetError("away")

    monkeypatch.setattr(manager.mirror.place.fs, "ls", away)
    with pytest.raises(MirrorError, match=r"must answer .*, found ConnectionResetError: away"):
        manager.load_latest(*Lab().parts())


def test_cache_that_cannot_be_examined_is_made_up_for_by_the_drive(mirrored, tmp_path: Path):
    manager, _ = mirrored
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").symlink_to("nowhere")
    with pytest.raises((CheckpointError, OSError)):
        manager.load_latest(*Lab().parts())  # no place to restore it to: it says so, and does not start over
    (tmp_path / "cache").unlink()
    assert manager.load_latest(*Lab().parts())[0] == 3


def test_training_never_waits_and_one_copy_is_in_flight(gate: threading.Event, tmp_path: Path, ledger: Ledger):
    """While the first copy hangs, four more saves commit; of those only the newest is copied then."""
    manager, lab = DriveCheckpointManager("gated://drive/a", tmp_path / "cache", 9, report=ledger), Lab()
    saves(manager, lab, 1)
    wait_until(lambda: threading.active_count() > 1, "the copy is in flight")
    saves(manager, lab, 4)
    assert [thread.name for thread in threading.enumerate()].count("mirror") == 1
    assert not manager.drain(0.01)
    assert ledger.kinds() == ["mirror_behind"]
    gate.set()
    assert manager.drain(PATIENCE_SECONDS)
    assert [entry["checkpoint"] for entry in ledger.entries[1:]] == ["step-1", "step-5"]
    assert steps_on("gated://drive/a") == [1, 5]


def test_next_start_finishes_the_copy_that_the_last_one_did_not(tmp_path: Path, ledger: Ledger):
    (tmp_path / "drive").write_text("not mounted yet")
    manager, lab = DriveCheckpointManager(tmp_path / "drive", tmp_path / "cache", report=ledger), Lab()
    saves(manager, lab, 2)
    manager.close()
    (tmp_path / "drive").unlink()
    again = DriveCheckpointManager(tmp_path / "drive", tmp_path / "cache", report=ledger)
    assert again.load_latest(*Lab().parts())[0] == 2
    assert again.drain(PATIENCE_SECONDS)
    assert steps_on(tmp_path / "drive") == [2]
