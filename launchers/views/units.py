"""Numbers with their units, short enough for a table."""

from __future__ import annotations

import math
from datetime import datetime

LARGE = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def duration(seconds: float) -> str:
    """In its two largest units: ``2 d 4 h``, ``3 min 20 s``; below a minute three digits, below a second ms."""
    if seconds < 59.95:
        return f"{seconds:.3g} s" if seconds >= 1 or seconds <= 0 else f"{seconds * 1000:.3g} ms"
    whole = round(seconds)
    number = next(k for k, (size, _) in enumerate(LARGE) if whole >= size)
    size, unit = LARGE[number]
    count, rest = divmod(whole, int(size))
    if number + 1 == len(LARGE):
        return f"{count} {unit}"
    smaller, its_unit = LARGE[number + 1]
    count_of_rest = int(rest // smaller)
    return f"{count} {unit} {count_of_rest} {its_unit}" if count_of_rest else f"{count} {unit}"


def moment(seconds: float) -> str:
    """Seconds since the epoch as local date and time with its offset: a report is read elsewhere, too."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def share(part: float, whole: float) -> str:
    """In per cent; empty where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole > 0 else ""


def compact(value: float) -> str:
    """At most four characters of digits, with k, M or G: for an axis."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    if abs(value) >= 0.01:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
