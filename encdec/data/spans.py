"""Random spans and their layout for many rows at once: the inner loop of UL2 corruption, in numpy.

Shapes: b rows of L tokens, each row with s >= 2 spans, so with s kept and s noise segments; K kept and N noise tokens.
A block of rows is a list of sections; the rows of one section have the same K, N and s.

Arrays "per segment" hold, row after row, the s kept segments and then the s noise segments of the row; a section's part
of such an array is [b, 2, s] (side 0 is kept, side 1 is noise).
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from encdec.data.randomness import GOLDEN32, mix32_in_place


class _Scratch(threading.local):
    """Buffers used again from call to call, one set per thread; fresh ones cost a third of the speed in page faults."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, name: str, size: int, dtype: type) -> np.ndarray:
        """[size] of `dtype` with any content, valid until `name` is taken again in this thread."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = np.empty(size, dtype=dtype)
        return buffer[:size]

    def ramp(self, size: int) -> np.ndarray:
        """[size] int64: 0, 1, 2, ...; read only."""
        buffer = self._buffers.get("ramp")
        if buffer is None or len(buffer) < size:
            buffer = self._buffers["ramp"] = np.arange(size)
        return buffer[:size]


_SCRATCH = _Scratch()


class Section(NamedTuple):
    """Neighbouring rows of a block that have one shape."""

    rows: slice
    """Place in the block."""
    keep: int
    """K, tokens per row that stay on the encoder side."""
    noise: int
    """N, tokens per row that go to the decoder side."""
    spans: int
    """s, at least 2 and at most min(K, N)."""

    @property
    def height(self) -> int:
        """b, rows of this section."""
        return self.rows.stop - self.rows.start

    @property
    def width(self) -> int:
        """Slots of one laid-out row: both sides with their sentinels, and one free slot (for EOS) behind each side."""
        return self.keep + self.noise + 2 * self.spans + 2


def segment_lengths(noise_words: np.ndarray, sections: list[Section], length: int) -> np.ndarray:
    """Cuts K and N tokens of each row into s random non-empty segments each.

    Every set of cuts is equally likely: the K - 1 (N - 1) gaps between neighbouring tokens draw a random key each, and
    the s - 1 smallest are cut. A row depends on its own word only.

    Args:
        noise_words: [b] uint64, one random word per row.
        sections: the rows, in order, without holes.
        length: L = K + N of every row.

    Returns:
        Length of each segment, in tokens, per segment: int64.
    """
    shape, size = (len(noise_words), length), len(noise_words) * length
    index = np.arange(length, dtype=np.uint32)
    columns = noise_words[:, None]
    keys = _SCRATCH.take("keys", size, np.uint32).reshape(shape)
    np.add(index * GOLDEN32, columns.astype(np.uint32), out=keys)  # the cast keeps the low half of the word
    high_halves = (columns >> np.uint64(32)).astype(np.uint32)
    mix32_in_place(keys, high_halves, _SCRATCH.take("mixing", size, np.uint32).reshape(shape))
    # The gap's own number in the low bits makes keys unequal, so that exactly s - 1 are at or below the threshold.
    low_bits = np.uint32((1 << length.bit_length()) - 1)
    keys &= ~low_bits
    keys |= index
    is_end = _SCRATCH.take("is_end", size, np.bool_).reshape(shape)
    is_end.fill(True)  # columns K - 1 and L - 1 stay so: the ends of both sides
    for rows, keep, _, spans in sections:
        for gaps in (slice(0, keep - 1), slice(keep, length - 1)):
            threshold = np.partition(keys[rows, gaps], spans - 2, axis=1)[:, spans - 2, None]
            np.less_equal(keys[rows, gaps], threshold, out=is_end[rows, gaps])
    ends = np.flatnonzero(is_end)
    lengths = np.empty_like(ends)
    lengths[0] = ends[0] + 1
    np.subtract(ends[1:], ends[:-1], out=lengths[1:])
    return lengths


def lay_out(tokens: np.ndarray, lengths: np.ndarray, sections: list[Section], sentinel_ids: np.ndarray) -> np.ndarray:
    """Lays out both sides of each row: encoder side, free slot, decoder side, free slot.

    The result is a chain of runs, one per segment. A run is the segment's tokens with one sentinel, which stands
    behind a kept segment and before a noise segment; the last run of a side includes the free slot.

    Args:
        tokens: [b, L] int64, kept and noise segments alternating, kept first.
        lengths: per segment, from `segment_lengths`.
        sections: the rows, in order, without holes.
        sentinel_ids: ids for span 0, 1, ...; at least as many as any row has spans.

    Returns:
        All rows flat, [sum of height * width over the sections] int64; free slots hold any token. The array is scratch:
        valid until the next call in this thread.
    """
    runs = lengths + 1
    places, first = [], 0
    for section in sections:
        shape = (section.height, 2, section.spans)
        here = slice(first, first + section.height * 2 * section.spans)
        runs[here].reshape(shape)[:, :, -1] += 1
        places.append((here, shape, section.rows.start * tokens.shape[1]))
        first = here.stop
    starts = np.cumsum(runs) - runs  # of the runs, in the result
    shifts, sentinel_at = -starts, starts  # from a place in the result to its source: the same throughout a run
    for here, shape, first_token in places:
        segments = lengths[here].reshape(shape)
        in_text_order = segments.transpose(0, 2, 1).ravel()  # keep, noise, keep, noise, ... of row after row
        begins = np.cumsum(in_text_order)
        begins += first_token - in_text_order
        shift = shifts[here].reshape(shape)
        shift += begins.reshape(shape[0], shape[2], 2).transpose(0, 2, 1)
        shift[:, 1] -= 1
        sentinel_at[here].reshape(shape)[:, 0] += segments[:, 0]
    sources = np.repeat(shifts, runs)
    sources += _SCRATCH.ramp(len(sources))
    sides = _SCRATCH.take("sides", len(sources), np.int64)
    tokens.reshape(-1).take(sources, mode="clip", out=sides)  # free slots may point one token past the end
    for here, shape, _ in places:
        sides[sentinel_at[here].reshape(-1, shape[2])] = sentinel_ids[: shape[2]]
    return sides
