"""A checkpoint exists only if it verifies: commits, corruptions, fall-back, retention, digests."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from encdec.checkpoints import CheckpointManager, logical_digest
from encdec.checkpoints import __main__ as command
from encdec.checkpoints.manifest import MANIFEST, FileRecord, read_manifest, verify, verify_names
from encdec.errors import CheckpointError, FencedError
from tests.encdec.checkpoints.damage import Lab, flip, payload


def test_load_goes_on_bit_identically(saved):
    manager, lab = saved
    expected = [lab.step() for _ in range(4)]
    other = Lab(seed=9)
    step, epoch, state = manager.load_latest(*other.parts())
    assert (step, epoch, state["samples_consumed"]) == (3, 0, 24)
    assert [other.step() for _ in range(4)] == expected
    assert all(torch.equal(a, b) for a, b in zip(lab.model.parameters(), other.model.parameters(), strict=True))


def test_nobody_else_can_read_and_nothing_temporary_stays(saved):
    manager, _ = saved
    for path in manager.output_dir.rglob("*"):
        if path.is_file() or path.name.startswith("step-"):
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    assert sorted(path.name for path in manager.output_dir.iterdir()) == ["step-1", "step-2", "step-3"]


def edit_manifest(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    values["samples_consumed"] += 8
    (folder / MANIFEST).write_text(json.dumps(values))


# name -> (damage done to the newest checkpoint, word in the reason)
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit in a shard": (lambda f: flip(payload(f)), "distcp"),
    "flipped bit in DCP's metadata": (lambda f: flip(f / "fsdp2" / ".metadata"), ".metadata"),
    "flipped bit in the trainer state": (lambda f: flip(f / "trainer_state.json", 8), "trainer_state.json"),
    "truncated shard": (lambda f: os.truncate(payload(f), 50), "50 bytes"),
    "missing shard": (lambda f: payload(f).unlink(), "no such file"),
    "missing manifest": (lambda f: (f / MANIFEST).unlink(), "no such file"),
    "torn manifest": (lambda f: os.truncate(f / MANIFEST, 40), "readable manifest"),
    "changed manifest": (edit_manifest, "own digest"),
    "stale file": (lambda f: (f / "fsdp2" / "__7_0.distcp").write_bytes(b"old"), "does not list"),
    "shard of another step": (lambda f: shutil.copy(payload(f.parent / "step-2"), payload(f)), "distcp"),
    "folder of another step": (
        lambda f: (shutil.rmtree(f), shutil.copytree(f.parent / "step-2", f)),
        "step 2",
    ),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "no such file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_previous_checkpoint_is_used(saved, name: str):
    manager, _ = saved
    damage, reason = DAMAGE[name]
    damage(manager.output_dir / "step-3")
    with pytest.raises(CheckpointError, match=reason.replace(".", r"\.")):
        manager.validate("step-3")
    other = Lab(seed=9)
    step, _, _ = manager.load_latest(*other.parts())
    assert step == 2
    assert reason in manager.rejected[0]
    shelf = list((manager.output_dir / "quarantine").iterdir())
    assert len(shelf) == 1
    assert reason in (shelf[0] / "REASON").read_text()


def test_folder_without_a_file_that_its_manifest_lists_is_not_committed(saved):
    """A rank may have written its part into another folder."""
    manager, _ = saved
    folder = manager.output_dir / "step-3"
    manifest = read_manifest(folder)
    verify_names(folder, manifest)
    elsewhere = FileRecord(path="fsdp2/__1_0.distcp", bytes=8, blake3="00")
    with pytest.raises(CheckpointError, match="no such file"):
        verify_names(folder, replace(manifest, files=[*manifest.files, elsewhere]))


def test_nothing_valid_means_none(saved):
    manager, _ = saved
    for step in (1, 2, 3):
        flip(payload(manager.output_dir / f"step-{step}"))
    assert manager.load_latest(*Lab().parts()) is None
    assert len(manager.rejected) == 3


def test_checkpoint_of_another_model_is_refused(saved):
    manager, _ = saved
    other = Lab(width=6)
    other.model.append(nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match="parameters of this model"):
        manager.load_latest(*other.parts())


def test_unfinished_saves_are_neither_used_nor_kept(saved):
    manager, _ = saved
    shutil.copytree(manager.output_dir / "step-3", manager.output_dir / "step-4.tmp-0")
    assert [info.step for info in manager.list_checkpoints()] == [1, 2, 3]
    assert manager.newest_valid() == manager.output_dir / "step-3"
    manager.discard_unfinished()
    assert not list(manager.output_dir.glob("*.tmp-*"))


def test_kill_between_the_two_renames_of_a_commit_loses_nothing(saved):
    manager, _ = saved
    step_3 = manager.output_dir / "step-3"
    shutil.copytree(step_3, manager.output_dir / "step-3.tmp-1")
    step_3.rename(manager.output_dir / "step-3.tmp-replaced-77")
    manager.discard_unfinished()
    assert sorted(path.name for path in manager.output_dir.iterdir()) == ["step-1", "step-2", "step-3"]
    manager.validate("step-3")
    shutil.copytree(step_3, manager.output_dir / "step-3.tmp-replaced-77")  # killed after the second
    manager.discard_unfinished()
    assert sorted(path.name for path in manager.output_dir.iterdir()) == ["step-1", "step-2", "step-3"]


def test_fenced_attempt_commits_nothing(tmp_path: Path):
    def fence() -> None:
        raise FencedError("Only the newest attempt may write", remedy="Nothing to do")

    manager, lab = CheckpointManager(tmp_path, fence=fence), Lab()
    lab.step()
    with pytest.raises(FencedError):
        lab.save(manager)
    assert not list(tmp_path.glob("step-1"))


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path):
    manager, lab = CheckpointManager(tmp_path, save_total_limit=2), Lab()
    for loss in (3.0, 1.0, 2.0, 2.5, 2.4):
        lab.step()
        lab.save(manager, {"loss": loss})
    assert [info.step for info in manager.list_checkpoints()] == [2, 5]
    other = Lab(seed=3)
    assert manager.load_best(*other.parts())[0] == 2


def test_the_same_step_can_be_saved_again(saved):
    """After a resume from further back the step comes round again."""
    manager, _ = saved
    other = Lab()
    manager.load(manager.output_dir / "step-2", *other.parts())
    other.step()
    before = logical_digest(manager.output_dir / "step-3")
    other.save(manager)
    assert logical_digest(manager.output_dir / "step-3") == before


def test_digest_is_of_the_logical_state(saved, tmp_path: Path):
    manager, _ = saved
    digests = {logical_digest(manager.output_dir / f"step-{step}") for step in (1, 2, 3)}
    assert len(digests) == 3
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)
    twin, lab = CheckpointManager(tmp_path / "twin", attempt=5, run_identity="x"), Lab()
    for _ in range(3):
        lab.step()
    lab.save(twin, {"loss": 1.0})
    assert logical_digest(twin.output_dir / "step-3") in digests  # the attempt, time and metrics do not count


def test_one_flipped_weight_changes_the_digest(saved, tmp_path: Path):
    manager, lab = saved
    with torch.no_grad():
        lab.model[0].weight[0, 0] += 1e-6
    other = CheckpointManager(tmp_path / "other")
    lab.save(other)
    assert logical_digest(other.output_dir / "step-3") != logical_digest(manager.output_dir / "step-3")


def test_command_line(saved, capsys):
    manager, _ = saved
    folder = manager.output_dir / "step-3"
    assert command.main(["digest", str(folder)]) == 0
    assert len(capsys.readouterr().out.strip()) == 64
    assert command.main(["verify", str(folder)]) == 0
    assert "all match" in capsys.readouterr().out
    assert command.main(["list", str(manager.output_dir), "--json"]) == 0
    assert [item["step"] for item in json.loads(capsys.readouterr().out)] == [1, 2, 3]
    bad = payload(folder)
    flip(bad)
    assert command.main(["verify", str(folder)]) == 1
    assert str(bad) in capsys.readouterr().err
    assert command.main(["digest", str(folder)]) == 1  # nothing is unpickled before it verifies
    assert command.main(["list", str(manager.output_dir / "nowhere")]) == 1


def test_manifest_says_what_it_holds(saved):
    manager, _ = saved
    manifest = read_manifest(manager.output_dir / "step-3")
    assert (manifest.step, manifest.samples_consumed, manifest.world_size, manifest.sharding) == (3, 24, 1, "fsdp2")
    assert {record.path for record in manifest.files} >= {"trainer_state.json", "fsdp2/.metadata"}
    assert verify(manager.output_dir / "step-3") == manifest


def test_every_letter_of_the_manifest_counts(saved):
    """Even where another spelling means the same: 1e-05 and 1E-05, the last digit of a time, a blank more."""
    manager, lab = saved
    lab.save(manager, {"loss": 1e-05})
    path = manager.output_dir / "step-3" / MANIFEST
    content = path.read_bytes()
    spellings = [
        bytes([*content[:i], content[i] ^ 1 << bit, *content[i + 1 :]]) for i in range(len(content)) for bit in range(8)
    ]
    for changed in (*spellings, content + b"\n", content[:-1], content.replace(b": ", b":  ", 1)):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            read_manifest(path.parent)
    path.write_bytes(content)
    read_manifest(path.parent)


@pytest.mark.parametrize("victim", [MANIFEST, "trainer_state.json"])
def test_pipe_in_the_place_of_a_file_does_not_hang(saved, victim: str):
    manager, _ = saved
    (manager.output_dir / "step-3" / victim).unlink()
    os.mkfifo(manager.output_dir / "step-3" / victim)
    assert manager.newest_valid() == manager.output_dir / "step-2"


def test_link_to_another_step_is_moved_away_without_a_mark_on_that_step(saved):
    manager, _ = saved
    shutil.rmtree(manager.output_dir / "step-3")
    (manager.output_dir / "step-3").symlink_to(manager.output_dir / "step-2")
    assert manager.newest_valid() == manager.output_dir / "step-2"
    [link, reason] = sorted((manager.output_dir / "quarantine").iterdir())
    assert link.is_symlink() and reason.name == f"{link.name}.REASON"
    assert "step 3, as the folder's name says" in reason.read_text()


def test_name_with_leading_zeros_is_no_checkpoint(saved):
    manager, _ = saved
    shutil.copytree(manager.output_dir / "step-3", manager.output_dir / "step-04")
    assert manager.newest_valid() == manager.output_dir / "step-3"
    assert manager.rejected == []


def test_checkpoint_of_another_run_is_used_only_by_name(tmp_path: Path):
    other, own = (CheckpointManager(tmp_path, run_identity=name) for name in ("another's", "this run's"))
    lab = Lab()
    lab.step()
    name = lab.save(other)
    with pytest.raises(CheckpointError, match=r"before it starts over.*1 left where they are.*one of another run"):
        own.load_latest(*Lab().parts())
    assert own.load(tmp_path / name, *Lab().parts())["step"] == 1
    lab.step()
    lab.save(own)
    assert own.newest_valid() == tmp_path / "step-2"


def test_checkpoint_of_another_run_is_neither_the_best_nor_deleted(tmp_path: Path):
    other, own = (CheckpointManager(tmp_path, 1, run_identity=name) for name in ("another's", "this run's"))
    lab = Lab()
    lab.step()
    lab.save(other, {"loss": 0.1})
    for loss in (3.0, 2.0, 1.0):
        lab.step()
        lab.save(own, {"loss": loss})
    assert [info.step for info in own.list_checkpoints()] == [1, 4]
    assert own.load_best(*Lab().parts())[0] == 4
