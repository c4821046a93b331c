"""YAML files as plain values, and ``section.key=value`` settings laid over them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from encdec.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 2e-4 as a number (YAML 1.1 would make it a string)."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string that ``_Loader`` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def dump_yaml(values: Mapping[str, Any]) -> str:
    """``values`` as a document that ``parse_yaml`` reads back equal, in the order given."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str) -> Any:
    """One YAML document as plain values; 2e-4 is a number."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file, UTF-8 in any locale, that holds a mapping; an empty file is an empty mapping.

    Raises:
        ConfigError: unreadable, not YAML, or not a mapping.
    """
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "The configuration file must be readable",
            found=f"{Path(path).absolute()} ({getattr(error, 'strerror', None) or error})",
            remedy="Run from the repository's directory, where configs/tiny.yaml is, or give --config an absolute path",
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that cannot be
        raise ConfigError(
            "The configuration file must be YAML",
            found=f"{path}: {' '.join(str(error).split())}",
            remedy="Mend that line; configs/tiny.yaml shows the form",
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            "A configuration file must be a mapping of sections",
            found=f"a {type(values).__name__} in {path}",
            remedy="Start it with one of the sections model, data, training, infra, phases",
        )
    return values


def apply_settings(values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """``values`` with each ``section.key=value`` laid over it; values are read as YAML (null, true, 2e-4, [1, 2]).

    Raises:
        ConfigError: a setting without ``=``, or a path that goes through a value that is not a mapping.
    """
    result = _deep_copy(values)
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or len(keys) < 2 or not all(keys):
            raise ConfigError(
                "--set takes section.key=value",
                found=repr(setting),
                remedy="Write for example --set training.learning_rate=1e-3",
            )
        try:
            value = parse_yaml(text)
        except (yaml.YAMLError, ValueError):
            raise ConfigError(
                "The value of --set must be YAML",
                found=repr(setting),
                remedy="Quote it, for example --set 'a.b=\"x: y\"'",
            ) from None
        node = result
        for key in keys[:-1]:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
            if not isinstance(node, dict):
                raise ConfigError(
                    f"--set {path} goes through {key}, which must be a section",
                    found=type(node).__name__,
                    remedy="Give the path of one value",
                )
        node[keys[-1]] = value
    return result


def _deep_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}
