"""What pydantic finds wrong with a tree of keys and values, as one paragraph for the person who wrote it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from encdec.errors import ConfigError


def explain(
    error: ValidationError,
    source: str,
    *,
    tree: type[BaseModel],
    remedy: str = "Correct {path} in the file or with --set {path}=VALUE",
) -> ConfigError:
    """One ConfigError for the first problem, with the count of the others.

    Args:
        source: where the values came from.
        tree: what they were to become.
        remedy: for a bad value at ``{path}``.
    """
    problems = error.errors(include_url=False)
    first, others = problems[0], len(problems) - 1
    path = ".".join(str(part) for part in first["loc"] if part != "[key]") or "(top level)"
    more = f" ({others} more problem{'s' if others > 1 else ''} after this one)" if others else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"], tree)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return ConfigError(
            f"{source}: every key must be known",
            found=path + more,
            remedy=f"Write {near[0]} instead" if near else f"Known keys there: {', '.join(known)}",
        )
    value = first.get("input")
    if first["type"] in ("model_type", "dict_type"):
        return ConfigError(
            f"{source}: {path} must be a section of keys and values",
            found=f"{value!r}{more}",
            remedy=f"Write {path}: on a line of its own and its keys below it, indented",
        )
    shown = repr(value) if not isinstance(value, dict) else "a mapping"
    if first["type"] == "string_pattern_mismatch" and "://" in str(value):
        shown = "an address"  # which may hold a secret
    rule = first["msg"].removeprefix("Value error, ")
    return ConfigError(
        f"{source}: {path} breaks the rule '{rule[0].lower() + rule[1:]}'",
        found=f"{shown} of type {type(value).__name__}{more}",
        remedy=remedy.format(path=path),
    )


def _known_keys(location: tuple[int | str, ...], section: type[BaseModel]) -> list[str]:
    """Keys allowed where the unknown key at ``location`` of a tree stands."""
    for part in location[:-1]:
        if str(part) in section.model_fields:  # else the key of a mapping such as phases, whose rows are the section
            section = next(_sections(section.model_fields[str(part)].annotation), section)
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field's type names, inside lists and mappings, too."""
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
