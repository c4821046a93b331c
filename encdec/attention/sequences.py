"""Sequences of different lengths as one row of tokens, so that nothing is computed for padding.

Shape legend:
    B    sequences                       S    width of a padded batch
    T    tokens of all sequences         L    tokens of the longest sequence
    N    heads                           D    head size
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Where the tokens of B sequences lie: packed [1, T, ...], in a padded batch [B, S, ...], and beside each other.

    A tuple, since FSDP2, DeepSpeed and checkpointing all know how to hand tuples on.
    """

    offsets: Tensor
    """[B + 1] int32: sequence b is tokens offsets[b] to offsets[b + 1] (flash attention's cu_seqlens)."""
    positions: Tensor
    """[1, T] int64: each token's place in its sequence."""
    batch: int
    """B."""
    width: int
    """S."""
    longest: int
    """L."""
    source: Tensor | None
    """[T] int64: each token's place in a flattened [B, S]; None where that is the identity."""
    slots: Tensor | None
    """[T] int64: each token's place in a flattened [B, L], each sequence at the left; None where it is the identity."""

    @classmethod
    def whole(cls, batch: int, width: int, device: torch.device) -> Sequences:
        """``batch`` sequences of ``width`` tokens each, nothing padded."""
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * width
        positions = torch.arange(width, device=device).repeat(batch)[None]
        return cls(offsets, positions, batch, width, width, None, None)

    @classmethod
    def from_mask(cls, mask: Tensor) -> Sequences:
        """The tokens at which ``mask`` [B, S] is not zero, wherever they stand; waits for the device once or twice."""
        kept, (batch, width) = mask.bool(), mask.shape
        lengths = kept.sum(1)
        host_lengths = lengths.tolist()
        if all(length == width for length in host_lengths):
            return cls.whole(batch, width, mask.device)
        longest = max(host_lengths)
        offsets = torch.zeros(batch + 1, dtype=torch.int32, device=mask.device)
        offsets[1:] = lengths.cumsum(0)
        source = kept.flatten().nonzero()[:, 0]
        positions = (kept.cumsum(1) - 1).flatten()[source]
        slots = source // width * longest + positions
        uniform = all(length == longest for length in host_lengths)
        return cls(offsets, positions[None], batch, width, longest, source, None if uniform else slots)

    @property
    def lengths(self) -> Tensor:
        """[B] int32."""
        return self.offsets.diff()

    @property
    def owners(self) -> Tensor:
        """[T] int64: the sequence that each token is of."""
        tokens = torch.arange(self.positions.shape[1], device=self.offsets.device, dtype=torch.int32)
        return torch.bucketize(tokens, self.offsets[1:], right=True)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, S, ...] -> [1, T, ...]."""
        flat = padded.flatten(0, 1)
        return (flat if self.source is None else flat.index_select(0, self.source))[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, T, ...] -> [B, S, ...], zeros where padded."""
        return _scattered(packed[0], self.source, self.batch, self.width)

    def spread(self, packed: Tensor) -> Tensor:
        """[1, N, T, D] -> [B, N, L, D], every sequence at the left, zeros behind it."""
        return _scattered(packed[0].transpose(0, 1), self.slots, self.batch, self.longest).transpose(1, 2)

    def gather(self, spread: Tensor) -> Tensor:
        """[B, L, N, D] -> [1, T, N, D]."""
        flat = spread.flatten(0, 1)
        return (flat if self.slots is None else flat.index_select(0, self.slots))[None]


def _scattered(tokens: Tensor, places: Tensor | None, batch: int, width: int) -> Tensor:
    """[T, ...] -> [batch, width, ...], zeros where no token is placed."""
    if places is not None:
        empty = tokens.new_zeros(batch * width, *tokens.shape[1:])
        tokens = empty.index_copy(0, places, tokens)
    return tokens.unflatten(0, (batch, width))


def tokens_before_the_end(labels: Tensor, ignored: int) -> Tensor:
    """[B, S] labels -> [B, S] bool: up to each row's last label that counts; the padding behind it is False.

    No row becomes empty: its first token stays, label or not.
    """
    counts = (labels != ignored).flip(-1).cumsum(-1).flip(-1) > 0
    counts[:, 0] = True
    return counts
