"""One rank's DCP file as an image in host memory: tensors are copied into their places, the image is written as it is.

DCP reads each chunk of a tensor from a slice of a file that ``torch.load`` understands. What ``torch.save`` puts before
and after the bytes of a storage depends on dtype and shape alone, so it is laid out once; a save then copies the
tensors, and writes and hashes one buffer. DCP's own writer serializes every tensor anew, and hashes nothing.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from encdec.checkpoints.manifest import FileRecord, write_hashed

ALIGNMENT = 64
"""Bytes to which torch.save aligns a storage within its slice; slices start aligned, so every tensor is."""


@dataclass(frozen=True)
class Chunk:
    """The part of a tensor that one rank writes: ``sizes`` from ``offsets`` of a tensor of ``shape``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """Where a chunk lies: bytes ``offset`` to ``offset + length`` of ``file``."""

    chunk: Chunk
    file: str
    offset: int
    length: int


class Image:
    """The content of one rank's file, reused from save to save.

    Args:
        chunks: none of them empty.
        file: name of the file.
        pinned: lay it out in page-locked memory, to which a GPU copies several times as fast.
    """

    def __init__(self, chunks: Sequence[Chunk], file: str, *, pinned: bool = False) -> None:
        self.file = file
        wrappings = [wrapping(chunk.dtype, chunk.sizes) for chunk in chunks]
        self.entries: list[Entry] = []
        end = 0
        for chunk, (before, after) in zip(chunks, wrappings, strict=True):
            end = -(-end // ALIGNMENT) * ALIGNMENT
            self.entries.append(Entry(chunk, file, end, len(before) + chunk.nbytes + len(after)))
            end += self.entries[-1].length
        self.buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        self.places = self._lay_out(wrappings)

    def _lay_out(self, wrappings: Iterable[tuple[bytes, bytes]]) -> list[Tensor]:
        """Put down what surrounds the tensors; returns the tensors' places."""
        places, content, end = [], self.content, 0
        for entry, (before, after) in zip(self.entries, wrappings, strict=True):
            content[end : entry.offset] = bytes(entry.offset - end)
            start, end = entry.offset + len(before), entry.offset + entry.length
            content[entry.offset : start] = before
            content[end - len(after) : end] = after
            chunk = entry.chunk
            places.append(self.buffer[start : end - len(after)].view(chunk.dtype).view(chunk.sizes))
        return places

    @property
    def content(self) -> memoryview:
        return self.buffer.numpy().data

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Copy one tensor a chunk, in order, from any device; done when this returns."""
        if not tensors:
            return
        torch._foreach_copy_(self.places, list(tensors), non_blocking=self.buffer.is_pinned())
        if self.buffer.is_pinned():
            torch.cuda.current_stream().synchronize()

    def write(self, folder: Path) -> FileRecord:
        """Write the file, hashing on the way.

        Raises:
            OSError: storage took no more; names the file.
        """
        return write_hashed(folder / self.file, self.content)


@functools.cache
def wrapping(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What ``torch.save`` writes before and after the bytes of a contiguous tensor."""
    recorder = _Recorder()
    with torch.serialization.skip_data():
        torch.save(torch.empty(sizes, dtype=dtype), cast(BinaryIO, recorder))  # its memory is never touched
    before, after = recorder.parts
    return bytes(before), bytes(after)


class _Recorder(io.RawIOBase):
    """Keeps what is written to it, cut in two where ``torch.save`` skips over a storage."""

    def __init__(self) -> None:
        self.parts = [bytearray()]
        self.position = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        self.parts[-1] += data
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_CUR, "torch.save skips forward only"
        self.parts.append(bytearray())
        self.position += offset
        return self.position

    def tell(self) -> int:
        return self.position


def index_of(entries: Iterable[Entry]) -> bytes:
    """DCP's ``.metadata`` for the chunks of all ranks."""
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, object] = {}
    for entry in sorted(entries, key=lambda entry: (entry.chunk.name, entry.chunk.offsets)):
        chunk, offsets = entry.chunk, torch.Size(entry.chunk.offsets)
        tensor = tensors.setdefault(
            chunk.name, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape), [])
        )
        storage[MetadataIndex(chunk.name, offsets, len(tensor.chunks))] = filesystem._StorageInfo(
            entry.file, entry.offset, entry.length
        )
        tensor.chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
    names: Mapping[str, tuple[str]] = {name: (name,) for name in tensors}
    return pickle.dumps(
        Metadata(tensors, planner_data=names, storage_data=storage, version=filesystem.CURRENT_DCP_VERSION)
    )
