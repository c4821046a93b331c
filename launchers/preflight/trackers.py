"""Whether trackers will take what a run sends them."""

from __future__ import annotations

import importlib.util
import netrc
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from encdec.training.run_config import RunConfig
from launchers.preflight.check import Check

WANDB = "https://api.wandb.ai"


def check_trackers(run: RunConfig, environment: Mapping[str, str]) -> list[Check]:
    """One check for each of ``training.report_to``."""
    checks = []
    for tracker in run.config.training.report_to:
        if importlib.util.find_spec(tracker) is None:
            remedy = f"pip install {tracker}, or leave it out of training.report_to"
            checks.append(Check(tracker, "fail", f"the package {tracker} is not installed here", remedy))
        elif tracker == "wandb":
            checks.append(check_wandb(environment))
        else:
            checks.append(Check(tracker, "ok", "written into the run directory"))
    return checks


def check_wandb(environment: Mapping[str, str]) -> Check:
    """Whether anybody is logged in, as wandb itself would look; nothing is sent, no key is read."""
    mode = environment.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return Check("wandb", "ok", f"WANDB_MODE={mode}: nothing is sent; upload later with wandb sync")
    if environment.get("WANDB_API_KEY"):
        return Check("wandb", "ok", "WANDB_API_KEY is set")
    host = urlsplit(environment.get("WANDB_BASE_URL", WANDB)).hostname or ""
    file = Path(environment.get("NETRC", Path(environment.get("HOME", "~"), ".netrc"))).expanduser()
    try:
        if host in netrc.netrc(str(file)).hosts:
            return Check("wandb", "ok", f"{file} has a login for {host}")
        found = f"none for {host} in {file}"
    except FileNotFoundError:
        found = f"no {file}"
    except (OSError, netrc.NetrcParseError) as error:
        found = f"{file} cannot be read ({error})"
    return Check(
        "wandb", "warn", f"nobody is logged in (no WANDB_API_KEY, {found}): it is recorded offline",
        "wandb login, or export WANDB_API_KEY in the shell that submits",
    )  # fmt: skip
