"""A run that ends leaves the mean of its last checkpoints."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from encdec.checkpoints import CheckpointManager
from encdec.checkpoints.manifest import verify
from encdec.checkpoints.payload import open_weights
from encdec.errors import FencedError
from encdec.files import RunPaths
from encdec.training.final_average import average_last
from tests.encdec.checkpoints.damage import Lab


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    """Of the checkpoints of steps 1, 2 and 3."""
    manager, lab = CheckpointManager(tmp_path / "checkpoints"), Lab()
    for _ in range(3):
        lab.step()
        lab.save(manager)
    return manager


@pytest.fixture
def tiny_files() -> Iterator[None]:
    """No file may grow beyond a kilobyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def make(manager: CheckpointManager, last: int, step: int = 3, **facts: Any) -> None:
    average_last(manager, last, step, **{"scheduled": 3, "stop_asked": lambda: False, **facts})


def names(manager: CheckpointManager) -> list[str]:
    return sorted(path.name for path in manager.output_dir.iterdir())


def test_real_run_averages_its_scheduled_checkpoints(twin: RunPaths):
    folder = twin.checkpoints / "average-60"
    made = verify(folder)
    assert list(made.made_of) == ["step-15", "step-30", "step-45", "step-60"]
    found = open_weights(folder, made)
    sources = [open_weights(twin.checkpoints / name, verify(twin.checkpoints / name)) for name in made.made_of]
    assert found.tensors.keys() == sources[0].tensors.keys()
    for name in found.tensors:
        expected = torch.stack([source.read(name).double() for source in sources]).mean(0).float()
        assert torch.equal(found.read(name), expected), name
    assert (folder / "model" / "config.json").is_file()  # so that it can be exported


def test_made_once(manager: CheckpointManager):
    make(manager, 2)
    folder = manager.output_dir / "average-3"
    assert list(verify(folder).made_of) == ["step-2", "step-3"]
    inode = folder.stat().st_ino
    make(manager, 3)
    assert folder.stat().st_ino == inode


@pytest.mark.parametrize("last", [0, 1])
def test_fewer_than_two_are_no_average(manager: CheckpointManager, last: int):
    make(manager, last)
    assert names(manager) == ["step-1", "step-2", "step-3"]


def test_one_checkpoint_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    manager, lab = CheckpointManager(tmp_path / "checkpoints"), Lab()
    lab.step()
    lab.save(manager)
    with caplog.at_level(logging.WARNING, "encdec.train"):
        make(manager, 5, step=1)
    assert names(manager) == ["step-1"]
    assert "no average of its last checkpoints: An average needs two or more" in caplog.text


def test_storage_that_takes_no_more_ends_no_run(
    manager: CheckpointManager, tiny_files: None, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "encdec.train"):
        make(manager, 3)
    assert names(manager) == ["step-1", "step-2", "step-3"]
    assert "no average of its last checkpoints" in caplog.text and "too large" in caplog.text


def test_neither_another_run_s_nor_later_steps_go_into_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    manager, lab = CheckpointManager(tmp_path / "checkpoints", run_identity="own"), Lab()
    foreign = CheckpointManager(tmp_path / "checkpoints", run_identity="another")
    for maker in (manager, manager, foreign, manager):
        lab.step()
        lab.save(maker)
    with caplog.at_level(logging.WARNING, "encdec.train"):
        make(manager, 5)  # the run ends with step 3
    assert list(verify(manager.output_dir / "average-3").made_of) == ["step-1", "step-2"]
    assert "average-3: mean of step-1, step-2, of 3 that the schedule has" in caplog.text


def test_stop_leaves_the_run_without(manager: CheckpointManager, caplog: pytest.LogCaptureFixture):
    looks = iter([False, False, True])
    with caplog.at_level(logging.WARNING, "encdec.train"):
        make(manager, 3, stop_asked=lambda: next(looks))
    assert names(manager) == ["step-1", "step-2", "step-3"]
    assert "found a stop that was asked for. python -m encdec.checkpoints average makes one" in caplog.text


def test_older_attempt_makes_none(manager: CheckpointManager):
    def fence() -> None:
        raise FencedError("Only the newest attempt may write", found="an older one", remedy="None")

    manager.fence = fence
    with pytest.raises(FencedError):
        make(manager, 3)
    assert names(manager) == ["step-1", "step-2", "step-3"]


def test_damaged_one_is_made_again(manager: CheckpointManager):
    make(manager, 3)
    (manager.output_dir / "average-3" / "trainer_state.json").unlink()
    make(manager, 3)
    assert list(verify(manager.output_dir / "average-3").made_of) == ["step-1", "step-2", "step-3"]


def test_what_a_kill_leaves_of_it_is_cleared_away(manager: CheckpointManager):
    (manager.output_dir / ".average-3.abc_1.tmp" / "fsdp2").mkdir(parents=True)
    manager.discard_unfinished()
    assert names(manager) == ["step-1", "step-2", "step-3"]
