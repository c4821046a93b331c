"""How often the same thing is said: the first time at once, then seldom, with a count of what was held back."""

from __future__ import annotations

from collections import Counter


class RateLimit:
    """One message of a kind an interval.

    Args:
        interval: in whatever unit ``admit`` gets the present in: steps, seconds.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._told: dict[str, float] = {}
        self._held: Counter[str] = Counter()

    def admit(self, kind: str, now: float) -> int | None:
        """None: not now. Else how many of this kind have been held back since the last that was admitted.

        A present that lies before the last one, as after a return to an earlier step, begins anew.
        """
        last = self._told.get(kind)
        if last is not None and last <= now < last + self._interval:
            self._held[kind] += 1
            return None
        self._told[kind] = now
        return self._held.pop(kind, 0)
