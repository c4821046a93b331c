"""Moving windows over the numbers of a run, and what is summed up of them. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

from encdec.errors import ConfigError


class MetricWindow:
    """The newest values of one metric. What is no finite number is passed over.

    Args:
        window_size: most values that it holds.

    Raises:
        ConfigError: it would hold none.
    """

    def __init__(self, window_size: int = 100) -> None:
        if window_size < 1:
            raise ConfigError("A window must hold at least one value", found=window_size, remedy="Use 1 or more")
        self.window_size = window_size
        self._values: deque[float] = deque(maxlen=window_size)

    def add(self, value: float) -> None:
        value = float(value)
        if math.isfinite(value):
            self._values.append(value)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> list[float]:
        """A copy, the oldest first."""
        return list(self._values)

    @property
    def mean(self) -> float:
        """0 without values."""
        return sum(self._values) / len(self._values) if self._values else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the values themselves (divided by their number); 0 without values."""
        mean = self.mean
        squares = sum((value - mean) * (value - mean) for value in self._values)
        return math.sqrt(squares / len(self._values)) if self._values else 0.0

    @property
    def min(self) -> float:
        """Infinite without values."""
        return min(self._values, default=math.inf)

    @property
    def max(self) -> float:
        """Minus infinity without values."""
        return max(self._values, default=-math.inf)


class MovingMedian:
    """Median of the newest values, kept sorted: cheap at every step."""

    def __init__(self, size: int) -> None:
        self._newest: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        if len(self._newest) == self._newest.maxlen:
            del self._sorted[bisect_left(self._sorted, self._newest[0])]
        self._newest.append(value)
        insort(self._sorted, value)

    @property
    def value(self) -> float:
        return self._sorted[len(self._sorted) // 2]
