"""Checkpoints beside training: the run is the same; storage that fails ends it, or not, as the configuration says."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from encdec.checkpoints import CheckpointManager
from encdec.checkpoints.fsdp2 import Fsdp2Payload
from encdec.checkpoints.manifest import FileRecord
from encdec.checkpoints.payload import Snapshot
from encdec.records import read_json_lines
from encdec.training import saving
from encdec.training.config import TrainingConfig
from encdec.training.observers import Records
from encdec.training.trainer import Qwen3EncoderDecoderTrainer
from tests.encdec.training.test_exact_continuation import SIGNAL, Lab, made

__all__ = ["made"]  # the fixture
Action = Callable[[], object]


class Acting:
    """A snapshot before whose writing something happens."""

    def __init__(self, snapshot: Snapshot, action: Action) -> None:
        self.snapshot, self.action, self.nbytes = snapshot, action, snapshot.nbytes

    def write(self, folder: Path, group: Any = None) -> list[FileRecord]:
        self.action()
        return self.snapshot.write(folder, group)


class ActingPayload(Fsdp2Payload):
    """FSDP2's payload; what a table says happens in the middle of a save, by number of the save (from 1)."""

    def __init__(self, actions: dict[int, Action], undo: Action = lambda: None) -> None:
        super().__init__()
        self.actions, self.undo, self.number = actions, undo, 0

    def snapshot(self, *parts: Any) -> Any:
        self.undo()
        self.number += 1
        snapshot = super().snapshot(*parts)
        return Acting(snapshot, self.actions[self.number]) if self.number in self.actions else snapshot


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory) -> dict[str, Any]:
    lab = Lab(*made, tmp_path_factory.mktemp("alone"), async_save=False)
    return lab.end(lab.train())


def test_run_that_saves_in_the_background_is_the_same(made, tmp_path: Path, undisturbed):
    lab = Lab(*made, tmp_path)
    assert lab.end(lab.train()) == undisturbed
    assert [step for kind, step in lab.memory.told if kind == "saved"] == [4, 8, 10]


def test_stop_waits_for_the_checkpoint_that_is_being_written(made, tmp_path: Path, undisturbed):
    lab, go = Lab(*made, tmp_path), threading.Event()
    trainer = lab.trainer({5: SIGNAL})
    trainer.checkpoints.payload = ActingPayload({1: lambda: go.wait(0.2)})
    assert trainer.train().cause == "signalled"
    assert [told for told in lab.memory.told if told[0] == "saved"] == [("saved", 4), ("saved", 5)]
    assert [info.scheduled for info in trainer.checkpoints.list_checkpoints()] == [True, False]
    assert lab.end(lab.train()) == undisturbed


def test_save_of_a_step_that_is_on_its_way_is_not_made_twice(made, tmp_path: Path):
    lab = Lab(*made, tmp_path)
    trainer = lab.trainer()
    trainer.checkpoints.payload = payload = ActingPayload({})
    trainer.save(goes_on=True)
    trainer.save()
    assert payload.number == 1
    assert lab.memory.told == [("saved", 0)]


def test_clock_adds_checkpoints_and_changes_nothing_else(made, tmp_path: Path, undisturbed, monkeypatch):
    monkeypatch.setattr(saving, "FIRST_GUESS_SECONDS", 0.0)
    lab = Lab(*made, tmp_path, save_every="auto", save_total_limit=9)
    lab.config.infra.mean_time_to_interrupt_hours = 1e-9
    trainer = lab.trainer()
    trainer.checkpoints.retention = CheckpointManager(tmp_path, 9).retention
    assert lab.end(trainer.train()) == undisturbed
    infos = {info.step: info for info in trainer.checkpoints.list_checkpoints()}
    extra = infos.keys() - {4, 8, 10}
    assert extra
    assert {4, 8, 10} <= infos.keys()
    assert not any(infos[step].scheduled or infos[step].metrics for step in extra)
    assert all(infos[step].scheduled and infos[step].metrics for step in (4, 8, 10))
    lab.config.training.save_every = "steps"
    trainer.checkpoints.retention = CheckpointManager(tmp_path, 3).retention
    trainer.save()
    assert [info.step for info in trainer.checkpoints.list_checkpoints()] == [4, 8, 10]  # extra ones go first


# ---- storage that fails


@pytest.fixture
def disk(tmp_path: Path, mounts: Callable[..., None]) -> Path:
    """A file system of 8 MB, several of the model's checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounts("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
    return folder


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1 << 14))


def empty(disk: Path) -> None:
    (disk / "filler").unlink(missing_ok=True)


def failing(made, disk: Path, number: int, **training: Any) -> tuple[Lab, Qwen3EncoderDecoderTrainer]:
    """A trainer on ``disk``, which fills up in the middle of its save ``number``."""
    lab = Lab(*made, disk / "checkpoints", **training)
    trainer = lab.trainer()
    trainer.checkpoints.payload = ActingPayload({number: lambda: fill(disk)}, undo=lambda: empty(disk))
    return lab, trainer


def test_disk_that_fills_up_costs_one_checkpoint_and_the_ledger_says_so(made, disk: Path, tmp_path: Path, undisturbed):
    lab, trainer = failing(made, disk, 2)
    trainer.observers.append(Records(tmp_path / "steps.jsonl", tmp_path / "events.jsonl"))
    result = trainer.train()
    assert [told for told in lab.memory.told if told[0] != "evaluated"] == [("saved", 4), ("failed", 8), ("saved", 10)]
    assert lab.end(result)["digest"] == undisturbed["digest"]
    assert lab.end(result)["evaluations"] == undisturbed["evaluations"]
    assert sorted(path.name for path in lab.root.iterdir()) == ["step-10", "step-4"]
    event = next(r for r in read_json_lines(tmp_path / "events.jsonl") if r["event"] == "save_failed")
    assert (event["step"], event["checkpoint"]) == (8, "step-4")
    assert os.strerror(errno.ENOSPC) in event["reason"] and "step-8.tmp-0" in event["reason"]


@pytest.mark.parametrize(
    ("number", "training"),
    [(1, {}), (2, {"on_save_failure": "stop"}), (3, {})],
    ids=["the first, with none to fall back on", "one of a run that is to stop", "the last"],
)
@pytest.mark.parametrize("async_save", [True, False])
def test_disk_that_fills_up_ends_the_run_where_it_must(made, disk: Path, number: int, training: dict, async_save: bool):
    lab, trainer = failing(made, disk, number, async_save=async_save, **training)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        trainer.train()
    assert [step for kind, step in lab.memory.told if kind == "failed"] == [[4], [8], [10]][number - 1]
    left = [[], ["step-4"], ["step-4", "step-8"]][number - 1]
    assert sorted(path.name for path in lab.root.iterdir()) == left  # nothing torn
    empty(disk)
    assert lab.train().cause == "complete"


def test_remount_to_read_only_costs_one_checkpoint(made, disk: Path, mounts: Callable[..., None], undisturbed):
    lab = Lab(*made, disk / "checkpoints")
    trainer = lab.trainer()
    trainer.checkpoints.payload = ActingPayload(
        {2: lambda: mounts("-o", "remount,ro", str(disk))}, undo=lambda: mounts("-o", "remount,rw", str(disk))
    )
    result = trainer.train()
    assert [told for told in lab.memory.told if told[0] != "evaluated"] == [("saved", 4), ("failed", 8), ("saved", 10)]
    assert lab.end(result)["digest"] == undisturbed["digest"]
    assert [info.step for info in trainer.checkpoints.list_checkpoints()] == [4, 10]


def test_run_without_room_for_a_checkpoint_does_not_begin(made, disk: Path):
    lab, trainer = failing(made, disk, 99)
    fill(disk)
    with pytest.raises(OSError, match=r"for a checkpoint \([\d,]+ bytes needed, [\d,]+ free\)"):
        trainer.train()
    assert not lab.memory.steps
    empty(disk)
    assert lab.train().cause == "complete"
    fill(disk)
    assert lab.train().cause == "complete"  # nothing to save, nothing to ask for


@pytest.mark.parametrize(
    ("stops_early", "last", "steps", "count", "first"),
    [
        (True, 5, 1000, 5, 0),
        (False, 5, 1000, 5, 500),
        (False, 5, 300, 5, 0),
        (False, 2, 1000, 2, 800),
        (False, 0, 1000, 0, 1000),
        (True, 1, 1000, 0, 0),
    ],
)
def test_checkpoints_of_the_average_are_known(stops_early: bool, last: int, steps: int, count: int, first: int):
    training = TrainingConfig(early_stopping_enabled=stops_early, save_steps=100, average_last=last)
    assert (saving.averaged(training), saving.averaged_from(training, steps)) == (count, first)
