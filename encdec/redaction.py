"""What must not be said: the values of environment variables that hold secrets."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping

SECRET_WORDS = frozenset(
    {
        "APIKEY", "CREDENTIAL", "CREDENTIALS", "KEY", "PASS", "PASSWD", "PASSWORD", "PAT", "SECRET", "TOKEN", "WEBHOOK",
    }
)  # fmt: skip
PLACE_WORDS = frozenset({"DIR", "FILE", "PATH"})
"""A variable whose name ends so says where a secret is."""
NAMED_SECRETS = "ENCDEC_ENV_SECRETS"
"""Variable that names further ones, separated by spaces: the launcher's --env-secret."""
SHORTEST_SECRET = 6
"""Characters; a shorter value would be found in words that are none."""
MASK = "***"
PASSWORD_IN_URL = re.compile(r"""(://[^\s/?#:@"'<>]*:)[^\s/?#"'<>]+@""")
"""``scheme://user:password@host``; a host's port is followed by no @."""


def looks_secret(name: str) -> bool:
    """Whether a variable of that name usually holds a secret: HF_TOKEN does, TOKENIZERS_PARALLELISM does not."""
    words = name.upper().split("_")
    return not SECRET_WORDS.isdisjoint(words) and words[-1] not in PLACE_WORDS


def secrets_in(environment: Mapping[str, str], named: Iterable[str] = ()) -> list[str]:
    """The values of variables that hold secrets by their name, or are said to; the longest first.

    Args:
        named: variables that hold secrets whatever their names look like; a value of several words is each of them.
    """
    named = {*named, *environment.get(NAMED_SECRETS, "").split()}
    found = set()
    for name, value in environment.items():
        if name in named:
            found |= {value, *value.split()}
        elif looks_secret(name) and not value.isdigit():  # a number is found in too much that is none: steps, ids
            found.add(value)
    return sorted((value for value in found if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def redact(text: str, secrets: Iterable[str] | None = None) -> str:
    """``text`` without the secrets, by default those of this process's environment, nor passwords in URLs."""
    for secret in secrets_in(os.environ) if secrets is None else secrets:
        text = text.replace(secret, MASK)
    return PASSWORD_IN_URL.sub(rf"\g<1>{MASK}@", text)


class Redacting(logging.Formatter):
    """A formatter whose lines, tracebacks included, hold no secret of this process's environment."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
