"""The weights of a DCP payload, read piece by piece."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from encdec.checkpoints.dcp_index import PayloadReader, in_short
from encdec.checkpoints.manifest import unreadable
from encdec.checkpoints.weights import PREFIX, Piece, whole
from encdec.errors import CheckpointError


class Fsdp2Weights:
    """Weights of a DCP payload, whatever the world size that wrote it.

    Args:
        folder: the payload of a verified checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = PayloadReader(folder)
        self._index: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._index, True)
        self.tensors = {
            key.removeprefix(PREFIX): torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
            for key, stored in sorted(self._index.state_dict_metadata.items())
            if key.startswith(PREFIX) and isinstance(stored, TensorStorageMetadata)
        }

    def pieces(self, name: str) -> list[Piece]:
        chunks = self._index.state_dict_metadata[PREFIX + name].chunks  # type: ignore[union-attr]
        return [Piece(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks if 0 not in chunk.sizes]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        meta = self.tensors[name]
        piece = piece or whole(meta)
        target = torch.empty(piece.sizes, dtype=meta.dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=torch.Size(piece.sizes))
        stored = self._index.state_dict_metadata[PREFIX + name]
        items = create_read_items_for_chunk_list(PREFIX + name, stored, [wanted])  # type: ignore[arg-type]
        if sum(math.prod(item.lengths) for item in items) != piece.elements:
            raise _torn(self._reader.folder, f"other parts of {name}")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))  # type: ignore[arg-type]
        except OSError as error:
            raise unreadable(self._reader.folder, error) from None
        except (RuntimeError, AssertionError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise _torn(self._reader.folder, f"{name}: {in_short(error)}") from None
        return target


class _Into:
    """The part of DCP's LoadPlanner that its reader uses: where what it reads goes."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        box = zip(item.dest_offsets, item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in box)]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """``tensor`` is a view of the target: it is there already."""


def _torn(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"The payload {folder} must hold the tensors that its index lists", found=found, remedy="Use another checkpoint"
    )
