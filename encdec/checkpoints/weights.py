"""The model's tensors of any checkpoint by name, read piece by piece in one process: what the offline tools work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from blake3 import blake3
from torch import Tensor

from encdec.checkpoints.stored import feed_tensor

PREFIX = "model."


class Piece(NamedTuple):
    """A box of a tensor: where it begins and how large it is, elements in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)


def whole(tensor: Tensor) -> Piece:
    """All of a tensor."""
    return Piece((0,) * tensor.dim(), tuple(tensor.shape))


def slices_of(piece: Piece) -> tuple[slice, ...]:
    """What to index a tensor with to have a box of it."""
    return tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.sizes, strict=True))


def box(values: Tensor, piece: Piece | None = None) -> Tensor:
    """A view of some box of a tensor, or the tensor."""
    return values if piece is None else values[slices_of(piece)]


def shape_in(shapes: Mapping[str, Sequence[int]], name: str) -> str:
    """The shape of one of several tensors, for messages: "(3, 4)", or "nothing"."""
    return str(tuple(shapes[name])) if name in shapes else "nothing"


class Weights(Protocol):
    """Parameters and persistent buffers of one verified checkpoint, under the model's own names."""

    tensors: Mapping[str, Tensor]
    """Name -> shape and dtype, as a tensor on the meta device."""

    def pieces(self, name: str) -> Sequence[Piece]:
        """Boxes that make up the tensor, as they are stored: each can be read alone, in memory of its own size."""

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """A tensor, or one piece of it, on the CPU.

        Raises:
            CheckpointError: it is not what the payload's index says.
            UnreadableCheckpoint: storage does not let it be read.
        """


def digest_weights(weights: Weights, take: Callable[[str, Tensor], object] = lambda name, tensor: None) -> str:
    """64 hex digits of the weights alone, whatever engine and however many ranks wrote them; one tensor in memory.

    Args:
        take: given each tensor, by the way.
    """
    hasher = blake3()
    for name in sorted(weights.tensors):
        tensor = weights.read(name)
        feed_tensor(hasher, name, tensor)
        take(name, tensor)
    return hasher.hexdigest()
