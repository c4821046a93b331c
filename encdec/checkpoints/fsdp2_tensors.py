"""The tensors of a DCP payload by name, read whole or piece by piece in one process."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from encdec.checkpoints.dcp_index import PayloadReader, in_short
from encdec.checkpoints.manifest import unreadable
from encdec.checkpoints.weights import PREFIX, Piece, whole
from encdec.errors import CheckpointError


class DcpTensors:
    """A DCP payload as named tensors, whatever the world size that wrote it; also in parts.

    Args:
        folder: the payload of a verified checkpoint.

    Raises:
        CheckpointError: its index is not about tensors alone.
        UnreadableCheckpoint: storage does not let it be read.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = PayloadReader(folder)
        self._index: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._index, True)
        self.tensors: dict[str, Tensor] = {
            name: torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")  # type: ignore[union-attr]
            for name, stored in sorted(self._index.state_dict_metadata.items())
        }
        """Name -> shape and dtype, as a tensor on the meta device; in order."""

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def parameters(self) -> dict[str, torch.Size]:
        return {name.removeprefix(PREFIX): meta.shape for name, meta in self.tensors.items() if name.startswith(PREFIX)}

    def pieces(self, name: str) -> list[Piece]:
        chunks = self._index.state_dict_metadata[name].chunks  # type: ignore[union-attr]
        return [Piece(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks if 0 not in chunk.sizes]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        meta = self.tensors[name]
        piece = piece or whole(meta)
        target = torch.empty(piece.sizes, dtype=meta.dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=torch.Size(piece.sizes))
        stored = self._index.state_dict_metadata[name]
        items = create_read_items_for_chunk_list(name, stored, [wanted])  # type: ignore[arg-type]
        if sum(math.prod(item.lengths) for item in items) != piece.elements:
            raise _torn(self._reader.folder, f"other parts of {name}")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))  # type: ignore[arg-type]
        except OSError as error:
            raise unreadable(self._reader.folder, error) from None
        except (RuntimeError, AssertionError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise _torn(self._reader.folder, f"{name}: {in_short(error)}") from None
        return target


class Fsdp2Weights:
    """The model's own among them; a Weights."""

    def __init__(self, folder: Path) -> None:
        self._stored = DcpTensors(folder)
        names = self._stored.parameters
        self.tensors = {name: self._stored.tensors[PREFIX + name] for name in names}

    def pieces(self, name: str) -> list[Piece]:
        return self._stored.pieces(PREFIX + name)

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        return self._stored.read(PREFIX + name, piece)


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
