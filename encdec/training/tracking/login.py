"""Whether anybody is logged in to W&B, as wandb itself would look; nothing is sent, and wandb is not loaded."""

from __future__ import annotations

import netrc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

WANDB = "https://api.wandb.ai"


@dataclass(frozen=True)
class Login:
    """What was found."""

    there: bool
    """Whether W&B would take what a run sends, or nothing is to be sent."""
    words: str
    """Where, or what is lacking."""


def wandb_login(environment: Mapping[str, str]) -> Login:
    """Look where wandb looks: its mode, its variable, then the netrc file that ``wandb login`` writes."""
    mode = environment.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return Login(True, f"WANDB_MODE={mode}: nothing is sent; upload later with wandb sync")
    if environment.get("WANDB_API_KEY"):
        return Login(True, "WANDB_API_KEY is set")
    host = urlsplit(environment.get("WANDB_BASE_URL", WANDB)).hostname or ""
    file = Path(environment.get("NETRC", Path(environment.get("HOME", "~"), ".netrc"))).expanduser()
    try:
        if host in netrc.netrc(str(file)).hosts:
            return Login(True, f"{file} has a login for {host}")
        found = f"none for {host} in {file}"
    except FileNotFoundError:
        found = f"no {file}"
    except (OSError, netrc.NetrcParseError) as error:
        found = f"{file} cannot be read ({error})"
    return Login(False, f"no WANDB_API_KEY, {found}")
