"""The weights of a ZeRO-3 payload, read piece by piece."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from encdec.checkpoints.partitions import Partitions
from encdec.checkpoints.weights import PREFIX, Piece, whole


class ZeroWeights:
    """Weights of a ZeRO-3 payload, whatever the world size that wrote it; a Weights.

    Args:
        folder: the payload of a verified checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._stored = Partitions(folder)
        self.tensors = {
            name: torch.empty(shape, dtype=self._stored.dtype_of(name), device="meta")
            for name, shape in sorted(self._stored.parameters.items())
        }

    def pieces(self, name: str) -> list[Piece]:
        """Ranges of rows, as many as there are ranks: their parts are flat, and may begin anywhere in a row."""
        everything = whole(self.tensors[name])
        if not everything.elements or not everything.sizes:
            return [everything]
        (rows, *rest), (_, *origin) = everything.sizes, everything.offsets
        height = math.ceil(rows / self._stored.world_size)
        return [Piece((first, *origin), (min(height, rows - first), *rest)) for first in range(0, rows, height)]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        meta = self.tensors[name]
        piece = piece or whole(meta)
        if not piece.sizes:
            return self._stored.read(PREFIX + name)
        (first, *offsets), (height, *sizes) = piece.offsets, piece.sizes
        row = math.prod(meta.shape[1:])
        rows = self._stored.read_range(PREFIX + name, first * row, height * row).view(height, *meta.shape[1:])
        columns = (slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        return rows[(slice(None), *columns)]
