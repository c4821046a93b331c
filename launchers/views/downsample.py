"""A curve of any length as few points as a picture can show, none of its spikes lost. Pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Envelope(NamedTuple):
    """A curve by buckets, float64 [B] each. Buckets without a finite value are left out."""

    x: np.ndarray
    """Mean abscissa of a bucket's values."""
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray


def envelope(x: np.ndarray, y: np.ndarray, buckets: int) -> Envelope:
    """Lowest, mean and highest value of each of ``buckets`` equal parts of the abscissa; the values themselves where
    there are no more than buckets. What is not finite is left out.

    Args:
        x, y: [N], in any order.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    if len(x) <= buckets:
        return Envelope(x, y, y, y)
    span = x[-1] - x[0]
    which = np.zeros(len(x), int) if span == 0 else np.minimum((x - x[0]) / span * buckets, buckets - 1).astype(int)
    starts = np.flatnonzero(np.diff(which, prepend=-1))
    counts = np.diff(starts, append=len(x))
    return Envelope(
        np.add.reduceat(x, starts) / counts,
        np.minimum.reduceat(y, starts),
        np.add.reduceat(y, starts) / counts,
        np.maximum.reduceat(y, starts),
    )
