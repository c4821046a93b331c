"""Whether trackers will take what a run sends them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from encdec.training.run_config import RunConfig
from encdec.training.tracking.login import wandb_login
from launchers.preflight.check import Check


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
    """Whether anybody is logged in."""
    login = wandb_login(environment)
    if login.there:
        return Check("wandb", "ok", login.words)
    return Check(
        "wandb", "warn", f"nobody is logged in ({login.words}): it is recorded offline",
        "wandb login, or export WANDB_API_KEY in the shell that submits",
    )  # fmt: skip
