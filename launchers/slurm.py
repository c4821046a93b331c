"""The only module that runs Slurm commands or knows their output formats."""

from __future__ import annotations

import shutil
import subprocess

CONTROLLER_TIMEOUT_SECONDS = 20
"""``scontrol ping`` answers in milliseconds; a dead controller takes 4-14 s to be given up."""


def why_no_controller() -> str | None:
    """None if a Slurm controller answers from here, else the reason in a few words."""
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        return "no scontrol on PATH"
    try:
        answer = subprocess.run(
            [scontrol, "ping"], capture_output=True, text=True, timeout=CONTROLLER_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol ping failed ({type(error).__name__})"
    if answer.returncode == 0 and " UP" in answer.stdout:
        return None
    last_line = (answer.stdout + answer.stderr).strip().rpartition("\n")[2]
    return last_line.strip() or f"scontrol ping exited {answer.returncode}"
