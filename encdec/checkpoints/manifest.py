"""The manifest: what makes a folder a checkpoint. Plain JSON with a BLAKE3 digest of every file and one of itself.

    step-<k>/manifest.json          this file, written last, before the folder gets its final name
    step-<k>/trainer_state.json     plain JSON
    step-<k>/<sharding>/            what the engine trains, in the engine's format (payload.py)

Nothing in a checkpoint is unpickled before ``verify`` has passed: DCP keeps its metadata as a pickle and has no
checksums of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from encdec.errors import CheckpointError, UnreadableCheckpoint
from encdec.files import MANIFEST

FORMAT_VERSION = 1
TRAINER_STATE = "trainer_state.json"
STEP_FOLDER = re.compile(r"step-(0|[1-9][0-9]*)")
HASH_BUFFER_BYTES = 8 * 2**20
PIECE_BYTES = 4 * 2**20
"""Hashed and written at a time: small enough to be in the processor's cache for the second of the two."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: path relative to its folder, size in bytes, BLAKE3 digest in hex."""

    path: str
    bytes: int
    blake3: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds and how it came to be."""

    step: int
    samples_consumed: int
    world_size: int
    sharding: str
    """Name of the payload: of its engine, and of its folder."""
    attempt: int
    run_identity: str
    metrics: dict[str, float]
    versions: dict[str, str]
    time: float
    """Seconds since the epoch."""
    scheduled: bool = True
    """Whether the schedule of steps asked for it; others were asked for by a person, a signal or the clock."""
    files: list[FileRecord] = field(default_factory=list)
    format_version: int = FORMAT_VERSION
    made_of: dict[str, str] = field(default_factory=dict)
    """Of an average: the ids of its sources and the digests of their manifests. Not written where empty."""

    def to_text(self) -> str:
        """JSON with the digest of everything else as its last entry."""
        values = asdict(self)
        if not self.made_of:
            del values["made_of"]
        return _text_of(values)


def _text_of(values: dict[str, Any]) -> str:
    return json.dumps(values | {"digest": _digest_of(values)}, indent=1) + "\n"


def _digest_of(values: dict[str, Any]) -> str:
    return blake3(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(root: Path, path: Path) -> FileRecord:
    """Size and digest of one file, hashed on all cores.

    Read, not memory-mapped: storage that fails under a mapping kills the process with SIGBUS instead of an error.
    """
    hasher, size = blake3(max_threads=blake3.AUTO), 0
    buffer = memoryview(bytearray(HASH_BUFFER_BYTES))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
            size += count
    return FileRecord(path.relative_to(root).as_posix(), size, hasher.hexdigest())


def write_hashed(path: Path, content: memoryview) -> FileRecord:
    """Write a new file that only its owner can read; returns its record under its bare name.

    Raises:
        OSError: names the file.
    """
    hasher = blake3()
    try:
        with open(path, "xb", buffering=0, opener=_private) as stream:
            for start in range(0, len(content), PIECE_BYTES):
                piece = content[start : start + PIECE_BYTES]
                hasher.update(piece)
                while piece:  # a disk that fills up takes a part, and refuses at the next try
                    piece = piece[stream.write(piece) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return FileRecord(path.name, len(content), hasher.hexdigest())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it anew. The caller syncs it with the other files, before the folder gets its final name."""
    (folder / MANIFEST).unlink(missing_ok=True)
    write_hashed(folder / MANIFEST, memoryview(manifest.to_text().encode()))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest itself.

    Raises:
        CheckpointError: missing, torn, changed after it was written, of another format, or of another step than the
            folder's name says.
        UnreadableCheckpoint: storage does not let it be read.
    """
    path = folder / MANIFEST
    with reading(path, "a readable manifest"):
        _require_regular(path)
        text = path.read_text(encoding="utf-8")
    return parse_manifest(text, path)


def parse_manifest(text: str, path: Path) -> Manifest:
    """The manifest that ``path`` holds as ``text``.

    Raises:
        CheckpointError: as ``read_manifest``.
    """
    with reading(path, "a readable manifest"):
        values = json.loads(text)
        del values["digest"]
        if values["format_version"] != FORMAT_VERSION:
            raise _broken(path, f"a manifest of format {FORMAT_VERSION}", values["format_version"])
        files = [FileRecord(**record) for record in values["files"]]
        manifest = Manifest(**{**values, "files": files})
    if text != _text_of(values):  # letter by letter: another spelling of the same values is damage, too
        raise _broken(path, "a manifest that matches its own digest", "another content")
    name = STEP_FOLDER.fullmatch(path.parent.name)
    if name and int(name.group(1)) != manifest.step:
        raise _broken(path, f"step {name.group(1)}, as the folder's name says", f"step {manifest.step}")
    return manifest


def manifest_digest(folder: Path) -> str:
    """The digest that the manifest in ``folder`` carries: 64 hex digits that stand for the whole checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    with reading(folder / MANIFEST, "a readable manifest"):
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["digest"])


def verify_files(folder: Path, records: Iterable[FileRecord], progress: Callable[[int], None] | None = None) -> None:
    """Compare files with their records; ``progress`` is told the bytes done after each file.

    Raises:
        CheckpointError: naming the first file that is missing, of another size, or of other content.
        UnreadableCheckpoint: naming the first that storage does not let be read.
    """
    for record in records:
        path = folder / record.path
        with reading(path, "every file of the manifest"):
            size = _require_regular(path).st_size  # first: it tells of most damage at once
            found = hash_file(folder, path) if size == record.bytes else None
        if found is None:
            raise _broken(path, f"a file of {record.bytes} bytes", f"{size} bytes")
        if found.blake3 != record.blake3:
            raise _broken(path, f"content with BLAKE3 {record.blake3[:16]}...", "other content of the same size")
        if progress:
            progress(record.bytes)


def verify_names(folder: Path, manifest: Manifest) -> None:
    """Refuse a folder whose files are not those that the manifest lists: some are left over from another save, or lie
    in another folder.

    Raises:
        CheckpointError: naming the first file that is too many or missing.
        UnreadableCheckpoint: a folder cannot be listed.
    """
    listed = {record.path for record in manifest.files} | {MANIFEST}
    with reading(folder, "folders that can be listed"):
        present = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=_raise) for name in names]
    for path in sorted(present):
        if path.relative_to(folder).as_posix() not in listed:
            raise _broken(path, "only files that the manifest lists", "a file that it does not list")
    for name in sorted(listed - {path.relative_to(folder).as_posix() for path in present}):
        raise _broken(folder / name, "every file of the manifest", "no such file")


def verify(folder: Path, progress: Callable[[int], None] | None = None) -> Manifest:
    """Check a whole checkpoint in this process.

    Raises:
        CheckpointError: naming what is wrong.
    """
    manifest = read_manifest(folder)
    verify_names(folder, manifest)
    verify_files(folder, manifest.files, progress)
    return manifest


def _require_regular(path: Path) -> os.stat_result:
    """Facts of a file; what is none counts as absent: reading from a pipe would never end."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return facts


@contextlib.contextmanager
def reading(path: Path, rule: str) -> Iterator[None]:
    """Around whatever reads ``path``: what is absent or ill-formed is the checkpoint's fault, the rest the storage's.

    Raises:
        CheckpointError: nothing at ``path``, or not what ``rule`` says.
        UnreadableCheckpoint: any other OSError.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _broken(path, rule, "no such file") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, rule, f"{type(error).__name__}: {error}") from None


def unreadable(path: Path, error: OSError) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(
        f"Storage must let the checkpoint be read at {path}",
        found=error,
        remedy="Mend the storage or the permissions; the checkpoint stays where it is",
    )


def _raise(error: OSError) -> None:
    raise error


def _broken(path: Path, rule: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"A checkpoint must have {rule} at {path}",
        found=found,
        remedy="Use an older checkpoint; this one is not loaded",
    )
