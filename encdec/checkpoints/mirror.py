"""A second place for checkpoints: verified copies there, and back.

A copy is hashed as it passes, against the source's manifest; the manifest follows last. What a cut-off copy left is
used by the next one as far as its digests match; a checkpoint that is there already is not read again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from blake3 import blake3

from encdec import files
from encdec.checkpoints import folders
from encdec.checkpoints.manifest import (
    HASH_BUFFER_BYTES,
    MANIFEST,
    FileRecord,
    Manifest,
    parse_manifest,
    reading,
    verify,
    verify_names,
)
from encdec.checkpoints.places import UNFINISHED, Place
from encdec.errors import CheckpointError

log = logging.getLogger("encdec.train")
Progress = Callable[[int], None]
Outcome = Literal["copied", "present", "gone"]


def _nothing(count: int) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class Copied:
    """What became of one checkpoint."""

    checkpoint_id: str
    outcome: Outcome
    """copied; present: it was there already; gone: retention, or a new commit of the step, took it away meanwhile."""
    bytes: int

    @property
    def step(self) -> int:
        return int(self.checkpoint_id.removeprefix("step-"))


class Mirror:
    """Copies of checkpoints in a second place.

    Args:
        target: path or fsspec URL of the folder that holds the ``step-<k>`` folders.
        hash_threads: threads that hash; 1 leaves the cores to training.

    Raises:
        ConfigError: there can be no mirror at ``target``.
    """

    def __init__(self, target: str | Path, *, hash_threads: int = blake3.AUTO) -> None:
        self.place = Place(target)
        self._threads = hash_threads

    def manifests(self) -> list[Manifest]:
        """Manifests of the mirrored checkpoints, by step; those that are not sound are left out.

        Raises:
            MirrorError: the place does not answer.
        """
        found = []
        with self.place.reached():
            for step in self.place.steps():
                try:
                    found.append(self._manifest(step))
                except CheckpointError as error:
                    log.warning("%s", error)
        return found

    def manifest(self, step: int) -> Manifest:
        """Manifest of the mirrored checkpoint of ``step``.

        Raises:
            CheckpointError: there is none, or it is not sound.
            MirrorError: the place does not answer.
        """
        with self.place.reached():
            return self._manifest(step)

    def _manifest(self, step: int) -> Manifest:
        path = Path(self.place.path(step, MANIFEST))
        text = self.place.manifest_text(step)
        with reading(path, "a readable manifest"):
            if text is None:
                raise FileNotFoundError
        return parse_manifest(text or "", path)

    # ---- there

    def copy_in(self, folder: Path, progress: Progress = _nothing) -> Copied:
        """Copy one checkpoint to the mirror, verifying it on the way.

        Raises:
            CheckpointError: it does not verify, so it is not mirrored.
            MirrorError: the place does not answer, or refuses.
        """
        text = ""
        try:
            with reading(folder / MANIFEST, "a readable manifest"):
                text = (folder / MANIFEST).read_text(encoding="utf-8")
            manifest = parse_manifest(text, folder / MANIFEST)
            size = sum(record.bytes for record in manifest.files)
            with self.place.reached():
                if self.place.manifest_text(manifest.step) == text:
                    progress(size)
                    return Copied(folder.name, "present", size)
            verify_names(folder, manifest)
            self._send(folder, manifest, text, progress)
        except CheckpointError:
            if _is_another_now(folder, text):
                return Copied(folder.name, "gone", 0)
            raise
        return Copied(folder.name, "copied", size)

    def _send(self, folder: Path, manifest: Manifest, text: str, progress: Progress) -> None:
        place, step = self.place, manifest.step
        with place.reached():
            place.begin(step)
            there = place.sizes(place.working_path(step))
        for record in manifest.files:
            target = place.working_path(step, record.path)
            with place.reached():
                same = there.get(record.path) == record.bytes and self._digest(target) == record.blake3
            if not same:
                self._send_file(folder / record.path, target, record)
            progress(record.bytes)
        with place.reached():
            listed = {record.path for record in manifest.files}
            for stray in there.keys() - listed:
                place.fs.rm_file(place.working_path(step, stray))
            place.commit(step, text)

    def _send_file(self, source: Path, target: str, record: FileRecord) -> None:
        with reading(source, "every file of the manifest"):
            stream = source.open("rb", buffering=0)
        with stream, self.place.reached():
            self.place.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            with self.place.fs.open(target, "wb") as sink:
                digest = self._pump(_Readable(stream, source), sink)
            if digest != record.blake3:
                self.place.fs.rm_file(target)
        _require_digest(source, digest, record)

    # ---- and back

    def copy_out(self, step: int, root: Path, progress: Progress = _nothing) -> Copied:
        """Copy one checkpoint from the mirror to ``root``, verifying it on the way.

        A checkpoint of that step in ``root`` is left alone if it verifies, else moved to quarantine.

        Raises:
            CheckpointError: the mirror's copy does not verify, or what is in its way cannot be moved.
            MirrorError: the place does not answer.
            OSError: ``root`` cannot be written.
        """
        final, work = root / f"step-{step}", root / f"step-{step}{UNFINISHED}"
        with self.place.reached():
            manifest = self._manifest(step)
        size = sum(record.bytes for record in manifest.files)
        if os.path.lexists(final):
            try:
                verify(final, progress)
                return Copied(final.name, "present", size)
            except CheckpointError as error:
                if not folders.quarantine(final, error):
                    raise
        files.make_private(root)
        folders.make_empty(work, manifest.sharding)
        for record in manifest.files:
            self._fetch_file(self.place.path(step, record.path), work, record)
            progress(record.bytes)
        files.atomic_write_text(work / MANIFEST, self._text_of(step))
        verify_names(work, manifest)
        files.fsync_tree(work)
        os.rename(work, final)
        files.fsync_directory(root)
        return Copied(final.name, "copied", size)

    def _text_of(self, step: int) -> str:
        with self.place.reached():
            return self.place.manifest_text(step) or ""

    def _fetch_file(self, source: str, work: Path, record: FileRecord) -> None:
        target = work / record.path
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shown = Path(source)
        with self.place.reached(), reading(shown, "every file of the manifest"):  # absent: the checkpoint's fault
            stream = self.place.fs.open(source, "rb")
        with stream, target.open("wb") as sink:
            target.chmod(0o600)
            digest = self._pump(_Reached(stream, self.place), sink)
        _require_digest(shown, digest, record)

    # ---- keeping it in order

    def verify(self, step: int, progress: Progress = _nothing) -> None:
        """Read a mirrored checkpoint back.

        Raises:
            CheckpointError: naming what is wrong.
            MirrorError: the place does not answer.
        """
        with self.place.reached():
            manifest = self._manifest(step)
            there = self.place.sizes(self.place.path(step))
        for record in manifest.files:
            path = self.place.path(step, record.path)
            with reading(Path(path), "every file of the manifest"):
                if record.path not in there:
                    raise FileNotFoundError
            with self.place.reached():
                digest = self._digest(path)
            _require_digest(Path(path), digest, record)
            progress(record.bytes)

    def delete(self, step: int) -> None:
        """Remove a checkpoint from the mirror.

        Raises:
            MirrorError: the place does not answer, or refuses.
        """
        with self.place.reached():
            self.place.delete(step)

    def _digest(self, path: str) -> str:
        with self.place.fs.open(path, "rb") as stream:
            return self._pump(stream, None)

    def _pump(self, source: IO[bytes] | _Readable | _Reached, sink: IO[bytes] | None) -> str:
        """Copy (or only read) to the end; returns the digest of what passed."""
        hasher = blake3(max_threads=self._threads)
        while block := source.read(HASH_BUFFER_BYTES):
            hasher.update(block)
            if sink is not None:
                sink.write(block)
        return hasher.hexdigest()


def _is_another_now(folder: Path, text: str) -> bool:
    """Whether ``folder`` is not, or no longer, the checkpoint whose manifest was ``text``."""
    if not os.path.lexists(folder):
        return True
    try:
        return bool(text) and (folder / MANIFEST).read_text(encoding="utf-8") != text
    except OSError:
        return False


class _Readable:
    """A file of the first place, whose failure to be read is not the mirror's."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream, self._path = stream, path

    def read(self, count: int) -> bytes:
        with reading(self._path, "every file of the manifest"):
            return self._stream.read(count)


class _Reached:
    """A file of the mirror, whose failure to be read is not the first place's."""

    def __init__(self, stream: IO[bytes], place: Place) -> None:
        self._stream, self._place = stream, place

    def read(self, count: int) -> bytes:
        with self._place.reached():
            return self._stream.read(count)


def _require_digest(path: Path, digest: str, record: FileRecord) -> None:
    if digest != record.blake3:
        raise CheckpointError(
            f"A checkpoint must have content with BLAKE3 {record.blake3[:16]}... at {path}",
            found="other content",
            remedy="This checkpoint is not copied; use an older one",
        )
