"""Storage that does not let checkpoints be read: nothing is lost, nothing starts over, nothing ends in a traceback."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from encdec.checkpoints import TRAINER_STATE, CheckpointManager
from encdec.checkpoints import __main__ as command
from encdec.checkpoints import manifest as manifest_module
from encdec.checkpoints.manifest import MANIFEST, hash_file, read_manifest, write_manifest
from encdec.errors import CheckpointError, UnreadableCheckpoint
from tests.encdec.checkpoints.damage import Lab, flip, payload


def loop(path: Path) -> None:
    """Put something in the place of ``path`` that exists but that nobody can read, not even root."""
    path.unlink()
    path.symlink_to(path)


def fail_to_read(path: Path) -> None:
    """As ``loop``, but it opens and then gives EIO, as failing storage does."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


# name -> what befalls the storage of a checkpoint
UNREADABLE: dict[str, Callable[[Path], object]] = {
    "shard": lambda f: loop(payload(f)),
    "DCP's metadata": lambda f: loop(f / "fsdp2" / ".metadata"),
    "trainer state": lambda f: loop(f / TRAINER_STATE),
    "manifest": lambda f: loop(f / MANIFEST),
    "manifest that opens": lambda f: fail_to_read(f / MANIFEST),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_passed_over_but_kept(saved, name: str):
    """It may be sound, and another try or another node may read it."""
    manager, _ = saved
    UNREADABLE[name](manager.output_dir / "step-3")
    with pytest.raises(UnreadableCheckpoint, match="Storage must"):
        manager.validate("step-3")
    other = Lab(seed=9)
    assert manager.load_latest(*other.parts())[0] == 2
    assert manager.rejected[0].startswith("left where it is: ")
    assert sorted(path.name for path in manager.output_dir.iterdir()) == ["step-1", "step-2", "step-3"]
    other.step()
    other.save(manager)  # the step comes round again and takes the place of what could not be read
    manager.validate("step-3")


def test_storage_that_reads_nothing_neither_loses_checkpoints_nor_starts_over(saved, monkeypatch):
    manager, _ = saved

    def failing(root: Path, path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "hash_file", failing)
        with pytest.raises(CheckpointError, match=r"3 left where they are.*step-3.*Input/output error.*move them away"):
            manager.load_latest(*Lab().parts())
    assert len(manager.rejected) == 3
    assert manager.load_latest(*Lab().parts())[0] == 3  # mended


def test_one_unread_checkpoint_among_damaged_ones_forbids_to_start_over(saved):
    manager, _ = saved
    loop(payload(manager.output_dir / "step-2"))
    for step in (1, 3):
        flip(payload(manager.output_dir / f"step-{step}"))
    with pytest.raises(CheckpointError, match="1 left where they are"):
        manager.load_latest(*Lab().parts())


def test_quarantine_that_cannot_be_made(saved):
    manager, _ = saved
    (manager.output_dir / "quarantine").write_text("in the way")
    flip(payload(manager.output_dir / "step-3"))
    assert manager.load_latest(*Lab().parts())[0] == 2
    assert (manager.output_dir / "step-3").is_dir()
    for step in (1, 2):
        flip(payload(manager.output_dir / f"step-{step}"))
    with pytest.raises(CheckpointError, match="3 left where they are"):
        manager.load_latest(*Lab().parts())


def test_file_in_the_place_of_a_checkpoint_is_moved_away(saved):
    manager, _ = saved
    (manager.output_dir / "step-4").write_text("no folder")
    assert manager.load_latest(*Lab().parts())[0] == 3
    assert not (manager.output_dir / "step-4").exists()


def test_storage_that_fails_after_the_check_is_no_traceback_either(saved):
    manager, _ = saved
    folder = manager.output_dir / "step-3"
    loop(payload(folder))
    with pytest.raises(UnreadableCheckpoint, match="fsdp2"):
        manager._load_verified(folder, *Lab().parts())
    loop(folder / "fsdp2" / ".metadata")
    with pytest.raises(UnreadableCheckpoint, match="metadata"):
        manager._load_verified(folder, *Lab().parts())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 3}', '{"step": 3, "scheduler": {}}'])
def test_trainer_state_that_is_none_is_named(saved, text: str):
    """Sound by its digest, so written like that: by another version, or by another program."""
    manager, _ = saved
    folder = manager.output_dir / "step-3"
    (folder / TRAINER_STATE).write_text(text)
    manifest = read_manifest(folder)
    records = [hash_file(folder, folder / record.path) for record in manifest.files]
    write_manifest(folder, dataclasses.replace(manifest, files=records))
    manager.validate("step-3")
    with pytest.raises(CheckpointError, match=TRAINER_STATE.replace(".", r"\.")):
        manager.load(folder, *Lab().parts())


def in_the_way_of(folder: Path, how: str) -> None:
    if how == "file":
        folder.write_text("no folder")
    elif how == "dangling link":
        folder.symlink_to("nowhere")
    else:
        folder.symlink_to(folder)


@pytest.mark.parametrize("how", ["file", "dangling link", "link to itself"])
def test_folder_of_checkpoints_that_is_none(tmp_path: Path, capsys, how: str):
    """A link whose target is not mounted is not the same as no checkpoints."""
    in_the_way_of(tmp_path / "checkpoints", how)
    manager = CheckpointManager(tmp_path / "checkpoints")
    for use in (manager.discard_unfinished, manager.newest_valid, manager.list_checkpoints):
        with pytest.raises(CheckpointError, match="folder that can be listed"):
            use()
    for words in (["list", str(tmp_path)], ["verify", str(tmp_path / "checkpoints")]):
        assert command.main(words) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_command_line_says_in_one_line_what_it_cannot_read(saved, capsys):
    manager, _ = saved
    folder = manager.output_dir / "step-3"
    loop(payload(folder))
    for words in ("verify", "digest"):
        assert command.main([words, str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: Storage must let the checkpoint be read at ")
        assert error.count("\n") == 1
