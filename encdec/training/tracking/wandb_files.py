"""What W&B's own files of a run hold: how far it has been told, though its process may have been killed.

A ``.wandb`` file is LevelDB's log (github.com/google/leveldb/blob/main/doc/log_format.md) of protobuf records, after a
header of seven bytes that belongs to the first block. W&B's process writes it some seconds late.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 1 << 15
BLOCKS_OF_AN_END = 16
HEADER_OF_A_FILE = 7
HEADER_OF_A_CHUNK = struct.Struct("<IHB")
"""Checksum, length, kind."""
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(file: Path, *, from_block: int = 0) -> Iterator[Any]:
    """The whole records (``wandb_internal_pb2.Record``) from a block on; a torn end is left out.

    Raises:
        google.protobuf.message.DecodeError: it is no such file.
    """
    from wandb.proto import wandb_internal_pb2

    make: Any = wandb_internal_pb2
    with file.open("rb") as stream:
        stream.seek(from_block * BLOCK)
        content = stream.read()
    at, parts = HEADER_OF_A_FILE if from_block == 0 else 0, None
    while at + HEADER_OF_A_CHUNK.size <= len(content):
        if BLOCK - at % BLOCK < HEADER_OF_A_CHUNK.size:
            at += BLOCK - at % BLOCK  # the rest of a block is too small for a header
            continue
        _, length, kind = HEADER_OF_A_CHUNK.unpack_from(content, at)
        at += HEADER_OF_A_CHUNK.size
        chunk = content[at : at + length]
        at += length
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(chunk) < length:
            return
        if kind in (FULL, FIRST):
            parts = chunk
        elif parts is not None:  # else it began before the block
            parts += chunk
        if kind in (FULL, LAST) and parts is not None:
            record = make.Record()
            record.ParseFromString(parts)
            yield record
            parts = None


def row_of(record: Any) -> dict[str, str] | None:
    """Values of a row of the run's history, by name, as JSON; None of another record."""
    if record.WhichOneof("record_type") != "history":
        return None
    return {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}


def last_step(folder: Path) -> int:
    """The last step of which the files below ``folder`` have a row, as far as they can be read; 0: none."""
    return max((step for file in folder.rglob("*.wandb") for step in _steps_at_the_end(file)), default=0)


def _steps_at_the_end(file: Path) -> Iterator[int]:
    """The steps of the newest rows of a file; a damaged one, of an attempt that is over, ends where it is damaged."""
    from google.protobuf.message import DecodeError

    with contextlib.suppress(DecodeError, OSError, ValueError):
        blocks = file.stat().st_size // BLOCK
        for record in read_records(file, from_block=max(0, blocks - BLOCKS_OF_AN_END)):
            row = row_of(record)
            if row and row.get("_step", "").isdecimal():
                yield int(row["_step"])
