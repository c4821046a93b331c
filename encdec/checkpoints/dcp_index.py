"""DCP's index of a payload (``.metadata``), read without trusting it.

The index is a pickle, which can run any program. A manifest tells of every change since it was written, but whoever can
write a whole checkpoint can write its manifest, too. So nothing is made of the index but the few classes that it is
about, and nothing is loaded but tensors: torch unpickles what DCP calls bytes without any care.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from encdec.checkpoints.manifest import reading
from encdec.errors import CheckpointError, EncdecError

INDEX = ".metadata"
_DCP = "torch.distributed.checkpoint"
ADMITTED = {
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        )
    ),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks a layout up by its name
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}  # fmt: skip
"""(module, name) of all that an index may be made of."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class PayloadReader(dcp.FileSystemReader):
    """DCP's reader of a folder, with an index that cannot run anything; the index is read once.

    Args:
        folder: the payload. Verify the checkpoint's manifest first, all the same.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            CheckpointError: absent, torn, or not only about tensors in files of this folder.
            UnreadableCheckpoint: storage does not let it be read.
        """
        if self._index is None:
            self._index = self._read_index()
        meta = self._index.storage_meta = self._index.storage_meta or StorageMeta()
        meta.load_id = self.load_id
        return self._index

    def _read_index(self) -> Metadata:
        path = self.folder / INDEX
        with reading(path, "DCP's metadata"), path.open("rb") as stream:
            try:
                index = _IndexUnpickler(stream).load()
            except (pickle.UnpicklingError, EOFError, IndexError, ImportError, OverflowError) as error:
                raise _refused(path, error) from None
            stray = _stray(index)
        if stray:
            raise _refused(path, stray)
        return index


def plain_error(error: BaseException, folder: Path) -> BaseException:
    """DCP's CheckpointException carries every rank's failure; the first one's cause, as an error of ours or OSError."""
    failures = getattr(error, "failures", None)
    if not failures:
        return error
    rank, wrapped = sorted(failures.items())[0]
    cause = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    if isinstance(cause, OSError | EncdecError):
        return cause
    return CheckpointError(
        f"Every rank must read or write its part of {folder}",
        found=f"rank {rank}: {in_short(cause)}",
        remedy="See that rank's log",
    )


def in_short(error: BaseException) -> str:
    """One line; of torch's refusal to unpickle only what it refused, not the advice to do it all the same."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and refused:
        return f"a tensor that is made by {refused.group(1)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _stray(index: Any) -> str:
    """The first thing in the index that no checkpoint of ours has; empty if there is none."""
    if not isinstance(index, Metadata):
        return type(index).__name__
    for name, stored in index.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            return f"{name}, which is no tensor"
    for item in index.storage_data.values():
        if Path(item.relative_path).name != item.relative_path:
            return f"the path {item.relative_path}"
    return ""


def _refused(path: Path, found: object) -> CheckpointError:
    return CheckpointError(
        f"The index {path} may hold nothing but DCP's classes about tensors in its own folder",
        found=found,
        remedy="Do not load this checkpoint, and ask who can write there; use another one or a mirror's copy",
    )
