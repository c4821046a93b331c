"""Asks a Hugging Face hub whether it has something; downloads nothing."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

SECONDS = 10.0
"""Waited for an answer."""


@dataclass(frozen=True)
class Answer:
    """What a hub said."""

    reached: bool
    """Whether a hub answered at all."""
    there: bool
    """Whether it has what was asked for, and gives it to this user."""
    words: str = ""
    """Why not."""


def ask(kind: Literal["models", "datasets"] | str, name: str) -> Answer:
    """Whether the hub that the environment names (HF_ENDPOINT) has a repository, as this user."""
    from huggingface_hub import constants, get_token  # a tenth of a second to import: only where asked for

    if constants.is_offline_mode():
        return Answer(False, False, "HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    token = get_token()
    request = urllib.request.Request(
        f"{endpoint}/api/{kind}/{quote(name)}", headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return Answer(True, isinstance(json.load(response), dict))
    except urllib.error.HTTPError as error:
        return Answer(error.code < 500, False, f"it answers {error.code} {error.reason}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(False, False, str(getattr(error, "reason", error)))


def cached(name: str) -> bool:
    """Whether a model lies in this user's cache of the hub, its configuration at least."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # not the name of a repository
        return False
