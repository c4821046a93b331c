"""A mirror: verified copies in a second place, by path or URL; resumed, never half, and good for a restore."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from encdec.checkpoints import CheckpointManager, logical_digest
from encdec.checkpoints import __main__ as command
from encdec.checkpoints.manifest import MANIFEST
from encdec.checkpoints.mirror import Mirror
from encdec.errors import CheckpointError, ConfigError, MirrorError
from tests.encdec.checkpoints.damage import Lab, flip, payload


@pytest.fixture(params=["path", "file URL", "memory URL"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for a mirror: one that can rename, and one that cannot."""
    path = tmp_path / "second" / "place"
    yield {"path": str(path), "file URL": f"file://{path}", "memory URL": f"memory://{path}"}[request.param]
    memory = fsspec.filesystem("memory")
    if memory.exists(str(tmp_path)):
        memory.rm(str(tmp_path), recursive=True)


def steps_there(target: str) -> list[int]:
    return [manifest.step for manifest in Mirror(target).manifests()]


def damage_there(target: str, step: int) -> None:
    place = Mirror(target).place
    name = next(name for name in place.sizes(place.path(step)) if name.endswith(".distcp"))
    content = bytearray(place.fs.cat_file(place.path(step, name)))
    content[100] ^= 1
    place.fs.pipe_file(place.path(step, name), bytes(content))


def copy_all(manager: CheckpointManager, target: str) -> list[str]:
    mirror = Mirror(target)
    return [mirror.copy_in(manager.output_dir / f"step-{step}").outcome for step in (1, 2, 3)]


def test_copies_are_checkpoints_and_are_not_made_twice(saved, target: str, tmp_path: Path):
    manager, _ = saved
    assert copy_all(manager, target) == ["copied"] * 3
    assert copy_all(manager, target) == ["present"] * 3
    mirror = Mirror(target)
    for step in (1, 2, 3):
        mirror.verify(step)
        assert mirror.copy_out(step, tmp_path / "back").outcome == "copied"
        assert logical_digest(tmp_path / "back" / f"step-{step}") == logical_digest(manager.output_dir / f"step-{step}")
    assert mirror.copy_out(2, tmp_path / "back").outcome == "present"
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["step-1", "step-2", "step-3"]
    assert CheckpointManager(tmp_path / "back").load_latest(*Lab(seed=9).parts())[0] == 3


def test_nobody_else_can_read_copies(saved, tmp_path: Path):
    manager, _ = saved
    copy_all(manager, str(tmp_path / "there"))
    Mirror(tmp_path / "there").copy_out(3, tmp_path / "back")
    paths = [*(tmp_path / "there").rglob("*"), *(tmp_path / "back").rglob("*")]
    assert len(paths) > 20
    for path in paths:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_only_what_is_valid_is_copied(saved, target: str):
    manager, _ = saved
    flip(payload(manager.output_dir / "step-2"))
    (manager.output_dir / "step-3" / "stray").write_text("left over")
    mirror = Mirror(target)
    assert mirror.copy_in(manager.output_dir / "step-1").outcome == "copied"
    for step, word in ((2, "distcp"), (3, "stray")):
        with pytest.raises(CheckpointError, match=word):
            mirror.copy_in(manager.output_dir / f"step-{step}")
    assert steps_there(target) == [1]


def test_copy_that_was_cut_off_is_none_and_is_resumed(saved, target: str):
    """Everything has arrived but a shard's end, another version of a file, and the manifest."""
    manager, _ = saved
    folder, place = manager.output_dir / "step-3", Mirror(target).place
    place.begin(3)
    place.fs.makedirs(place.working_path(3, "fsdp2"), exist_ok=True)
    place.fs.pipe_file(place.working_path(3, "fsdp2/.metadata"), (folder / "fsdp2" / ".metadata").read_bytes())
    shard = payload(folder)
    place.fs.pipe_file(place.working_path(3, f"fsdp2/{shard.name}"), shard.read_bytes()[:-100])
    state = (folder / "trainer_state.json").read_bytes()
    place.fs.pipe_file(place.working_path(3, "trainer_state.json"), bytes(reversed(state)))
    place.fs.pipe_file(place.working_path(3, "fsdp2/__9_0.distcp"), b"of a larger world")
    assert steps_there(target) == []
    sent: list[str] = []
    mirror = Mirror(target)
    send = mirror._send_file
    mirror._send_file = lambda source, *rest: (sent.append(source.name), send(source, *rest))  # type: ignore[method-assign]
    assert mirror.copy_in(folder).outcome == "copied"
    assert sorted(sent) == sorted([shard.name, "trainer_state.json"])  # .metadata was whole
    mirror.verify(3)
    assert not any("__9_0" in name for name in mirror.place.sizes(mirror.place.path(3)))
    assert steps_there(target) == [3]


def test_step_that_was_saved_again_takes_the_place_of_its_copy(saved, target: str, tmp_path: Path):
    manager, lab = saved
    copy_all(manager, target)
    lab.save(manager, {"loss": 1.5})
    mirror = Mirror(target)
    assert mirror.copy_in(manager.output_dir / "step-3").outcome == "copied"
    assert [manifest.metrics for manifest in mirror.manifests()] == [{}, {}, {"loss": 1.5}]
    mirror.verify(3)
    assert not [name for name in mirror.place.names() if ".tmp-" in name]


def test_damage_in_the_mirror_is_found_and_never_restored(saved, target: str, tmp_path: Path, capsys):
    manager, _ = saved
    copy_all(manager, target)
    damage_there(target, 3)
    with pytest.raises(CheckpointError, match="distcp"):
        Mirror(target).verify(3)
    with pytest.raises(CheckpointError, match="distcp"):
        Mirror(target).copy_out(3, tmp_path / "back")
    run = tmp_path / "empty"
    run.mkdir()
    assert command.main(["mirror", str(run), target, "--restore"]) == 1  # it says so, and takes the one before
    captured = capsys.readouterr()
    assert "step-2" in captured.out
    assert "step-3" in captured.err
    assert CheckpointManager(run).newest_valid() == run / "step-2"
    place = Mirror(target).place
    place.fs.rm_file(place.path(2, "trainer_state.json"))
    with pytest.raises(CheckpointError, match="trainer_state"):
        Mirror(target).copy_out(2, tmp_path / "back")


def test_restore_takes_the_place_of_a_damaged_one(saved, target: str):
    manager, _ = saved
    copy_all(manager, target)
    flip(payload(manager.output_dir / "step-3"))
    assert Mirror(target).copy_out(3, manager.output_dir).outcome == "copied"
    assert manager.newest_valid() == manager.output_dir / "step-3"
    assert len(list((manager.output_dir / "quarantine").iterdir())) == 1


def test_source_that_retention_takes_away_is_no_error(saved, target: str):
    manager, _ = saved
    mirror = Mirror(target)
    pump = mirror._pump

    def slow_pump(source, sink):
        shutil.rmtree(manager.output_dir / "step-1", ignore_errors=True)
        return pump(source, sink)

    mirror._pump = slow_pump  # type: ignore[method-assign]
    outcome = mirror.copy_in(manager.output_dir / "step-1").outcome
    assert outcome == "gone"
    assert steps_there(target) == []
    assert mirror.copy_in(manager.output_dir / "step-1").outcome == "gone"


def test_source_that_is_committed_anew_meanwhile_is_no_error(saved, target: str):
    """The end of training does it: first without metrics, then with them."""
    manager, lab = saved
    mirror = Mirror(target)
    send, began = mirror._send_file, []

    def overtaken(source: Path, *rest) -> None:
        if not began:
            began.append(source)
            lab.step()
            other = Lab(seed=1)
            other.schedule.step = 3
            other.save(manager, {"loss": 2.0})
        send(source, *rest)

    mirror._send_file = overtaken  # type: ignore[method-assign]
    assert mirror.copy_in(manager.output_dir / "step-3").outcome == "gone"
    assert steps_there(target) == []
    assert mirror.copy_in(manager.output_dir / "step-3").outcome == "copied"


def test_command_line(saved, target: str, capsys):
    manager, _ = saved
    words = ["mirror", str(manager.output_dir), target]
    assert command.main(words) == 0
    assert capsys.readouterr().out.count("copied") == 3
    assert command.main([*words, "--verify", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["outcome"] for one in document["checkpoints"]] == ["present"] * 3
    assert command.main([*words, "--keep", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deleted"] == ["step-1", "step-2"]
    assert steps_there(target) == [3]
    damage_there(target, 3)
    assert command.main([*words, "--verify"]) == 1  # and the next two are copied anew all the same
    assert "step-3" in capsys.readouterr().err
    assert steps_there(target) == [1, 2, 3]
    assert command.main(["mirror", str(manager.output_dir), target, "--all"]) == 78
    flip(payload(manager.output_dir / "step-1"))
    shutil.rmtree(manager.output_dir / "step-2")
    assert command.main([*words, "--restore", "--all", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {one["checkpoint_id"]: one["outcome"] for one in document["checkpoints"]} == {
        "step-3": "present", "step-2": "copied", "step-1": "copied"
    }  # fmt: skip


class Locked(MemoryFileSystem):
    """Fails as some clients do, with an error of their own on two lines."""

    protocol = "locked"

    def cat_file(self, path: str, *arguments, **options) -> bytes:
        raise RuntimeError("no credentials\nhere")


def test_places_that_cannot_be(saved, tmp_path: Path, capsys):
    manager, _ = saved
    for bad, word in (
        ("sftp://me:secret@host/a", r"hold no password.*me:\*\*\*@host"),
        ("nowhere://a", "URL that fsspec knows"),
    ):
        with pytest.raises(ConfigError, match=word):
            Mirror(bad)
    assert command.main(["mirror", str(manager.output_dir), "sftp://me:secret@host/a"]) == 78
    assert "secret" not in capsys.readouterr().err
    assert command.main(["mirror", str(manager.output_dir), str(manager.output_dir)]) == 78
    assert "another place" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert command.main(["mirror", str(manager.output_dir), str(tmp_path / "file" / "there")]) == 1
    assert "must answer" in capsys.readouterr().err
    fsspec.register_implementation("locked", Locked, clobber=True)
    assert command.main(["mirror", str(manager.output_dir), "locked://a"]) == 1
    error = capsys.readouterr().err
    assert "RuntimeError: no credentials here" in error
    assert error.count("\n") == 1
    (tmp_path / "run").mkdir()
    assert command.main(["mirror", str(tmp_path / "run"), str(tmp_path / "none"), "--restore"]) == 1
    assert "none in" in capsys.readouterr().err


def test_full_disk_keeps_what_is_there_and_the_copy_goes_on_later(saved, tmp_path: Path, mounts: Callable[..., None]):
    manager, _ = saved
    disk = tmp_path / "disk"
    disk.mkdir()
    mounts("-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk))
    mirror = Mirror(disk / "there")
    assert mirror.copy_in(manager.output_dir / "step-1").outcome == "copied"
    with pytest.raises(MirrorError, match="No space left"):
        mirror.copy_in(manager.output_dir / "step-2")
    mirror.verify(1)
    mounts("-o", "remount,size=1m", str(disk))
    for step in (2, 3):
        mirror.copy_in(manager.output_dir / f"step-{step}")
        mirror.verify(step)
    assert not list((disk / "there").glob("*.tmp-*"))


def test_manifest_is_what_makes_a_copy_one(saved, target: str):
    manager, _ = saved
    copy_all(manager, target)
    place = Mirror(target).place
    place.fs.pipe_file(place.path(2, MANIFEST), b'{"torn": ')
    assert steps_there(target) == [1, 3]
    place.delete_unfinished(before=3)
    place.delete(1)
    assert steps_there(target) == [3]
