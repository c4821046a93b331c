"""What may befall a checkpoint on storage, drawn at random: each damage done to files, and what must be said of it.

A scene holds checkpoints whose files are hard links to sound ones: a damage first makes the file its own.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

PAGE_BYTES = 4096
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Scene:
    """A folder of checkpoints with the newest one to be damaged, and others to take files from."""

    newest: Path
    previous: Path
    other_attempt: Path
    """The checkpoint of the same step that another attempt made, from another state."""
    other_run: Path
    """The checkpoint of the same step of a run of another configuration."""
    random: Random

    def files(self) -> list[Path]:
        return sorted(path for path in self.newest.rglob("*") if path.is_file())

    def any_file(self) -> Path:
        """Half of the time each file is as likely as another, else each byte: the shards are most of the bytes."""
        files = self.files()
        weights = [path.stat().st_size for path in files] if self.random.random() < 0.5 else None
        return self.random.choices(files, weights)[0]

    def there(self, path: Path, folder: Path) -> Path:
        """The file of ``folder`` that ``path`` is in the newest checkpoint."""
        return folder / path.relative_to(self.newest)


@dataclass(frozen=True)
class Done:
    """What was done."""

    words: str
    """Regular expression: what the reason must say."""
    broken: int = 1
    """How many of the newest checkpoints are no longer valid."""
    kept: bool = False
    """Whether it must be left where it is, because it is sound, or may be and could not be read."""


Damage = Callable[[Scene], Done | None]
"""None: what was drawn would have changed nothing."""


def named(path: Path) -> str:
    """The reason names the file, or the manifest that it no longer fits."""
    return re.escape(str(path))


def replace_content(path: Path, content: bytes) -> Done | None:
    """A new file in the place of the linked one."""
    if content == path.read_bytes():
        return None
    mode = path.stat().st_mode
    path.unlink()
    path.write_bytes(content)
    path.chmod(mode)
    return Done(named(path))


def flip_bit(scene: Scene) -> Done | None:
    path = scene.any_file()
    content = bytearray(path.read_bytes())
    content[scene.random.randrange(len(content))] ^= 1 << scene.random.randrange(8)
    return replace_content(path, bytes(content))


def garble(scene: Scene) -> Done | None:
    """Random bytes over a part of a file."""
    path = scene.any_file()
    content = path.read_bytes()
    begin = scene.random.randrange(len(content))
    length = min(len(content) - begin, scene.random.randint(1, 2 * PAGE_BYTES))
    return replace_content(path, content[:begin] + scene.random.randbytes(length) + content[begin + length :])


def zero_page(scene: Scene) -> Done | None:
    path = scene.any_file()
    content = path.read_bytes()
    begin = scene.random.randrange(0, len(content), PAGE_BYTES)
    page = len(content[begin : begin + PAGE_BYTES])
    return replace_content(path, content[:begin] + bytes(page) + content[begin + page :])


def shift(scene: Scene) -> Done | None:
    """Some bytes lost, as many added at the end: the size is right."""
    path = scene.any_file()
    content = path.read_bytes()
    begin, length = scene.random.randrange(len(content)), scene.random.randint(1, 64)
    lost = content[begin : begin + length]
    return replace_content(path, content[:begin] + content[begin + length :] + bytes(len(lost)))


def truncate(scene: Scene) -> Done | None:
    path = scene.any_file()
    content = path.read_bytes()
    return replace_content(path, content[: scene.random.randrange(len(content))])


def extend(scene: Scene) -> Done | None:
    path = scene.any_file()
    tail = scene.random.choice([b"\n", b"\0", b" ", scene.random.randbytes(scene.random.randint(1, PAGE_BYTES))])
    return replace_content(path, path.read_bytes() + tail)


def lose_file(scene: Scene) -> Done:
    path = scene.any_file()
    path.unlink()
    return Done(named(path))


def lose_folder(scene: Scene) -> Done:
    """A folder of the payload, all files, or the folder itself with a file in its place."""
    how = scene.random.choice(["payload", "all", "file"])
    if how == "payload":
        payload = scene.random.choice([path for path in scene.newest.iterdir() if path.is_dir()])
        shutil.rmtree(payload)
        return Done(named(payload))
    shutil.rmtree(scene.newest)
    if how == "all":
        scene.newest.mkdir()
    else:
        scene.newest.write_bytes(scene.random.randbytes(10))
    return Done(named(scene.newest))


def swap_files(scene: Scene) -> Done | None:
    """Two files of the checkpoint have each other's name."""
    one, other = scene.random.sample(scene.files(), 2)
    if one.read_bytes() == other.read_bytes():
        return None
    exchange(one, other)
    return Done(f"{named(one)}|{named(other)}")


def swap_steps(scene: Scene) -> Done | None:
    """A file and that of the step before have each other's place: neither checkpoint is valid."""
    path = scene.any_file()
    other = scene.there(path, scene.previous)
    if path.read_bytes() == other.read_bytes():
        return None
    exchange(path, other)
    return Done(named(path), broken=2)


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name(f"{one.name}.aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def take_from(folder: Callable[[Scene], Path]) -> Damage:
    """A file of another checkpoint in the place of its own."""

    def damage(scene: Scene) -> Done | None:
        path = scene.any_file()
        source = scene.there(path, folder(scene))
        content = source.read_bytes() if source.exists() else b""
        done = replace_content(path, content)
        # another manifest is a sound one, and it is the files then that do not fit it
        return done and (Done(named(scene.newest)) if path.name == MANIFEST else done)

    return damage


def take_all_but_one(folder: Callable[[Scene], Path]) -> Damage:
    """Everything of another checkpoint but one file."""

    def damage(scene: Scene) -> Done | None:
        kept = scene.any_file()
        source = scene.there(kept, folder(scene))
        if not source.exists() or source.read_bytes() == kept.read_bytes():
            return None
        content = kept.read_bytes()
        shutil.rmtree(scene.newest)
        shutil.copytree(folder(scene), scene.newest)
        kept.unlink()
        kept.write_bytes(content)
        return Done(named(scene.newest))

    return damage


def add_file(scene: Scene) -> Done:
    """A file too many: left over from another step, another rank count, an editor, a file system."""
    folder = scene.random.choice([scene.newest, *(path for path in scene.newest.iterdir() if path.is_dir())])
    name = scene.random.choice(["__7_0.distcp", ".metadata.tmp", "trainer_state.json~", ".hidden", "deeper/file", "x"])
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(scene.there(scene.any_file(), scene.previous), path)
    return Done(f"{named(path)}.*does not list")


def wrong_step(scene: Scene) -> Done:
    """The folder has the name of another step, as it may be written."""
    step = int(scene.newest.name.removeprefix("step-"))
    later = step + scene.random.randint(1, 1000)
    scene.newest.rename(scene.newest.with_name(f"step-{later}"))
    return Done(f"step {later}, as the folder's name says at .*, found step {step}")


def swapped_names(scene: Scene) -> Done:
    exchange(scene.newest, scene.previous)
    return Done("as the folder's name says", broken=2)


def step_of_another_name(scene: Scene) -> Done:
    """The newest checkpoint is the one before, copied or linked."""
    shutil.rmtree(scene.newest)
    if scene.random.random() < 0.5:
        shutil.copytree(scene.previous, scene.newest)
    else:
        scene.newest.symlink_to(scene.random.choice([scene.previous, scene.previous.name]))
    return Done("as the folder's name says")


def tear_manifest(scene: Scene) -> Done | None:
    """Cut somewhere, or zeros from there on, as after a power failure."""
    path = scene.newest / MANIFEST
    content = path.read_bytes()
    cut = scene.random.randrange(len(content))
    return replace_content(path, content[:cut] + bytes(len(content) - cut) * scene.random.randint(0, 1))


def foreign_manifest(scene: Scene) -> Done | None:
    source = scene.random.choice([scene.other_run, scene.other_attempt, scene.previous])
    done = replace_content(scene.newest / MANIFEST, (source / MANIFEST).read_bytes())
    return done and Done(named(scene.newest))


def foreign_checkpoint(scene: Scene) -> Done:
    """Another run's checkpoint of the same step, whole."""
    shutil.rmtree(scene.newest)
    shutil.copytree(scene.other_run, scene.newest)
    return Done(f"{named(scene.newest)}, found one of another run", kept=True)


def link_nowhere(scene: Scene) -> Done:
    path = scene.any_file()
    path.unlink()
    path.symlink_to(scene.random.choice(["nowhere", "/nowhere/file"]))
    return Done(named(path))


def link_to_other(scene: Scene) -> Done | None:
    """A link to the file of the step before."""
    path = scene.any_file()
    other = scene.there(path, scene.previous)
    if path.read_bytes() == other.read_bytes():
        return None
    path.unlink()
    path.symlink_to(other)
    return Done(named(scene.newest) if path.name == MANIFEST else named(path))


def something_else(scene: Scene) -> Done:
    """A folder or a pipe in the place of a file."""
    path = scene.any_file()
    path.unlink()
    if scene.random.random() < 0.5:
        path.mkdir()
    else:
        os.mkfifo(path)
    return Done(named(path))


def link_to_itself(scene: Scene) -> Done:
    path = scene.any_file()
    path.unlink()
    path.symlink_to(path.name)
    return Done(named(path), kept=True)


def forbid(scene: Scene) -> Done:
    """No permission to read a file, or to enter a folder."""
    path = scene.random.choice([*scene.files(), *(path for path in scene.newest.rglob("*") if path.is_dir())])
    if path.is_file():
        shutil.copy(path, path.with_name("own"))
        path.with_name("own").replace(path)
    path.chmod(0)
    return Done(named(path), kept=True)


DAMAGES: dict[str, tuple[int, Damage]] = {
    "flipped bit": (20, flip_bit),
    "random bytes": (6, garble),
    "zeroed page": (6, zero_page),
    "shifted content": (4, shift),
    "truncated file": (8, truncate),
    "extended file": (6, extend),
    "missing file": (5, lose_file),
    "missing folder": (3, lose_folder),
    "files swapped within": (4, swap_files),
    "files swapped between steps": (4, swap_steps),
    "stale file of another step": (4, take_from(lambda scene: scene.previous)),
    "file of another attempt": (4, take_from(lambda scene: scene.other_attempt)),
    "attempts mixed, but one file": (3, take_all_but_one(lambda scene: scene.other_attempt)),
    "file too many": (4, add_file),
    "wrong step in the name": (3, wrong_step),
    "names of two steps swapped": (2, swapped_names),
    "another step under the name": (2, step_of_another_name),
    "torn manifest": (5, tear_manifest),
    "manifest of another checkpoint": (3, foreign_manifest),
    "checkpoint of another run": (2, foreign_checkpoint),
    "link to nothing": (2, link_nowhere),
    "link to another step's file": (2, link_to_other),
    "folder or pipe for a file": (2, something_else),
    "link to itself": (2, link_to_itself),
    "no permission": (2, forbid),
}
"""Name -> (weight, damage)."""


# ---- what is no damage: none of these may be objected to


def untouched(scene: Scene) -> None:
    return


def copied(scene: Scene) -> None:
    """Another copy of the same bytes, with other times."""
    shutil.copytree(scene.newest, scene.newest.with_name("copy"))
    shutil.rmtree(scene.newest)
    scene.newest.with_name("copy").rename(scene.newest)


def made_read_only(scene: Scene) -> None:
    copied(scene)
    for path in scene.newest.rglob("*"):
        path.chmod(0o500 if path.is_dir() else 0o400)


def moved_behind_a_link(scene: Scene) -> None:
    away = scene.newest.parent.with_name("elsewhere")
    away.mkdir(exist_ok=True)
    scene.newest.rename(away / scene.newest.name)
    scene.newest.symlink_to(away / scene.newest.name)


def with_leftovers(scene: Scene) -> None:
    """Beside it: what killed saves and deletions leave."""
    step = int(scene.newest.name.removeprefix("step-"))
    shutil.copytree(scene.previous, scene.newest.with_name(f"step-{step + 1}.tmp-0"))
    shutil.copytree(scene.previous, scene.newest.with_name(f"{scene.previous.name}.tmp-deleted-77"))
    (scene.newest.with_name(f"step-{step + 2}.tmp-3")).mkdir()


def with_strays(scene: Scene) -> None:
    """Beside it: what people and programs leave."""
    for name in ("latest", ".nfs0001", "notes.txt", "step-", "step-x", "step-1e9", f"step-0{10**6}", "best"):
        (scene.newest.with_name(name)).write_text("step-1")
    (scene.newest.with_name("quarantine") / "step-3.1").mkdir(parents=True)


CONTROLS: dict[str, Callable[[Scene], None]] = {
    "untouched": untouched,
    "copied": copied,
    "made read-only": made_read_only,
    "moved behind a link": moved_behind_a_link,
    "leftovers of kills beside it": with_leftovers,
    "strays beside it": with_strays,
}
