"""Where a page goes that a person has asked for."""

from __future__ import annotations

from pathlib import Path

from encdec.errors import ConfigError
from encdec.files import atomic_write_text

SUFFIXES = (".html", ".htm")


def require_page(file: Path) -> None:
    """A slip must not replace a file of another kind.

    Raises:
        ConfigError: its name is not that of a page.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"A page's name ends in {' or '.join(SUFFIXES)}", found=str(file), remedy="Name it so")


def write_page(file: Path, page: str) -> None:
    """Whole or not at all, for its user alone.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        atomic_write_text(file, page)
    except OSError as error:
        raise ConfigError(
            "A page goes where it can be written", found=f"{file} ({error.strerror})", remedy="Give another --html FILE"
        ) from None
