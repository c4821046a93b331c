"""What must be on this machine before a sandbox can come up. Every refusal names the command that lifts it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

from encdec.errors import MissingPrerequisite

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGE_OF = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "sinfo": "slurm-client",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
"""Command -> Debian and Ubuntu package that brings it."""

INSTALL = "apt-get update && apt-get install -y --no-install-recommends"


def missing_packages() -> list[str]:
    """The packages to install, each once, in a fixed order."""
    return list(dict.fromkeys(p for tool, p in PACKAGE_OF.items() if not shutil.which(tool, path=SYSTEM_PATH)))


def check() -> None:
    """Raise MissingPrerequisite unless a sandbox can come up here."""
    check_root()
    if packages := missing_packages():
        rule = "The sandbox runs Slurm, munge and MariaDB from this machine's packages"
        raise MissingPrerequisite(
            rule, found=f"{', '.join(packages)} not installed", remedy=f"Install: {INSTALL} {' '.join(packages)}"
        )
    _check_namespaces()


def check_root() -> None:
    if os.geteuid() != 0:
        again = shlex.join(["sudo", sys.executable, "-m", "launchers.sandbox", *sys.argv[1:]])
        rule = "Only root may make, change or enter the sandbox's namespaces"
        raise MissingPrerequisite(rule, found=f"uid {os.geteuid()}", remedy=f"Run: {again}")


def _check_namespaces() -> None:
    attempt = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    done = subprocess.run(attempt, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        rule = "This machine must let root make network, PID and mount namespaces"
        remedy = "Inside a container, start it with --privileged"
        raise MissingPrerequisite(rule, found=done.stderr.strip(), remedy=remedy)


def slurm_version() -> tuple[int, int]:
    """Slurm's release as (year, month): (22, 5) for "slurm-wlm 22.05.8"."""
    path = shutil.which("slurmd", path=SYSTEM_PATH) or "slurmd"
    text = subprocess.run([path, "-V"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"(\d+)\.(\d+)", text)
    return (int(release[1]), int(release[2])) if release else (0, 0)
