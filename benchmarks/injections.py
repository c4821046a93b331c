"""Injections of damage into checkpoints, one after another, and what the manager makes of each."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.damages import CONTROLS, DAMAGES, Done, Scene
from encdec.checkpoints import CheckpointManager, logical_digest
from encdec.checkpoints.manifest import read_manifest
from encdec.checkpoints.payload import payload_named

NOBODY = 65534
LOADED_EVERY = 50
"""Every so many injections the checkpoint that is fallen back to is read tensor by tensor, too."""


@dataclass(frozen=True)
class Material:
    """Sound checkpoints of the same steps, three or more, each set in a folder of its own."""

    run: Path
    other_attempt: Path
    """Of another state."""
    other_run: Path
    """Of another configuration."""


@dataclass
class Tally:
    """What was counted, by kind of damage."""

    injected: Counter[str] = field(default_factory=Counter)
    detected: Counter[str] = field(default_factory=Counter)
    named: Counter[str] = field(default_factory=Counter)
    fallen_back: Counter[str] = field(default_factory=Counter)
    controls: Counter[str] = field(default_factory=Counter)
    alarms: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Field:
    """A folder of checkpoints that is laid out anew for every injection: the files are links to those of ``material``.

    Args:
        root: an empty folder, on the file system of ``material``.
    """

    def __init__(self, material: Material, root: Path, random: Random) -> None:
        self.material, self.random, self.tally = material, random, Tally()
        self._root = root / "checkpoints"
        self._steps = sorted(int(path.name.removeprefix("step-")) for path in material.run.glob("step-*"))
        self._digests = {step: logical_digest(material.run / f"step-{step}") for step in self._steps}
        newest = read_manifest(material.run / f"step-{self._steps[-1]}")
        self._identity, self._payload = newest.run_identity, payload_named(newest.sharding)

    def inject(self, name: str | None = None) -> None:
        """One damage, of a kind that is drawn unless ``name`` says it; one that would change nothing is drawn again."""
        name = name or self.random.choices(list(DAMAGES), [weight for weight, _ in DAMAGES.values()])[0]
        self.tally.injected[name] += 1
        for _ in range(100):
            done = DAMAGES[name][1](self._scene())
            if done:
                self._judge(name, done)
                return
        raise RuntimeError(f"{name} changes nothing")

    def control(self, name: str | None = None) -> None:
        """Something that is no damage: the newest checkpoint must be taken, and none be objected to."""
        name = name or self.random.choice(list(CONTROLS))
        scene = self._scene()
        CONTROLS[name](scene)
        self.tally.controls[name] += 1
        manager = self._manager()
        found = manager.newest_valid()
        if found != scene.newest or manager.rejected:
            self.tally.alarms[name] += 1
            self.tally.failures.append(f"{name}: {found} taken, objections {manager.rejected}")

    def _scene(self) -> Scene:
        for folder in (self._root, self._root.with_name("elsewhere")):
            remove(folder)
        shutil.copytree(self.material.run, self._root, copy_function=os.link)
        newest, previous = (f"step-{step}" for step in (self._steps[-1], self._steps[-2]))
        return Scene(
            newest=self._root / newest,
            previous=self._root / previous,
            other_attempt=self.material.other_attempt / newest,
            other_run=self.material.other_run / newest,
            random=self.random,
        )

    def _manager(self) -> CheckpointManager:
        return CheckpointManager(self._root, run_identity=self._identity, payload=self._payload)

    def _judge(self, name: str, done: Done) -> None:
        """Detected, the reason named, and the newest sound checkpoint found."""
        expected = self._steps[-1 - done.broken]
        manager = self._manager()
        found = manager.newest_valid()
        said = "\n".join(manager.rejected)
        detected = len(manager.rejected) == done.broken and self._put_where_it_belongs(done, said)
        reason = re.search(done.words, said) is not None
        back = found == self._root / f"step-{expected}" and self._as_it_was(name, expected)
        for counter, true in (
            (self.tally.detected, detected),
            (self.tally.named, reason),
            (self.tally.fallen_back, back),
        ):
            counter[name] += true
        if not (detected and reason and back):
            wanted = f"step-{expected} after {done.broken} of which {done.words!r} is said"
            self.tally.failures.append(f"{name}: {found} taken, said {said or 'nothing'}; wanted {wanted}")

    def _put_where_it_belongs(self, done: Done, said: str) -> bool:
        """What is proven wrong lies in quarantine with the reason that was told; what may be sound is where it was."""
        shelf = self._root / "quarantine"
        moved = list(shelf.iterdir()) if shelf.exists() else []
        if done.kept:
            return not moved and said.startswith("left where it is: ")
        reasons = [path.read_text().strip() for path in shelf.rglob("*REASON")]
        folders = [path for path in moved if not path.name.endswith("REASON")]
        return len(folders) == len(reasons) == done.broken and all(reason and reason in said for reason in reasons)

    def _as_it_was(self, name: str, step: int) -> bool:
        if self.tally.injected[name] % LOADED_EVERY:
            return True
        return logical_digest(self._root / f"step-{step}") == self._digests[step]


def remove(folder: Path) -> None:
    """Delete what a damage may have closed."""
    for path in folder.rglob("*") if folder.exists() else ():
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def open_field(material: Material, random: Random) -> Iterator[Field]:
    """A field with copies of ``material`` in a temporary folder. Root, to whom nothing is closed, is nobody inside."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        copies = Material(*(shutil.copytree(path, root / name) for name, path in vars(material).items()))
        field_ = Field(copies, root, random)  # all is imported once it has read them: nobody may not import
        with as_nobody(root) if os.geteuid() == 0 else contextlib.nullcontext():
            try:
                yield field_
            finally:
                remove(root / "checkpoints")


@contextlib.contextmanager
def as_nobody(root: Path) -> Iterator[None]:
    """Everything under ``root`` belongs to nobody, and so does this process while inside."""
    for path in (root, *root.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def run_injections(field_: Field, count: int, every: int, tell: Callable[[int], None]) -> Tally:
    """``count`` injections with a control after every ``every``; ``tell`` is told how many are done."""
    for number in range(1, count + 1):
        field_.inject()
        if number % every == 0:
            field_.control()
        tell(number)
    return field_.tally
