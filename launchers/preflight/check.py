"""One line of the checklist, and the checklist as text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What was looked at, and what to do about it."""

    name: str
    verdict: Verdict
    message: str
    remedy: str = ""


def failed(checks: Sequence[Check]) -> bool:
    """Whether any of them must be mended first."""
    return any(check.verdict == "fail" for check in checks)


def lines(checks: Sequence[Check]) -> list[str]:
    """Verdict, name, what was found; what to do on a line of its own."""
    said = []
    for check in checks:
        said.append(f"{check.verdict:<5} {check.name:<14} {check.message}")
        if check.verdict != "ok" and check.remedy:
            said.append(f"{'':<21}{check.remedy}")
    return said


def amount(nbytes: float) -> str:
    """Bytes in words: 12.4 GB, 3.1 MB (10**9, 10**6)."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"
