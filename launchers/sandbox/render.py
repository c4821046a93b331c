"""Templates of slurm/sandbox -> the text of every configuration file. Pure but for reading the templates."""

from __future__ import annotations

from pathlib import Path
from string import Template

from launchers.sandbox.layout import CONTROLLER, SLURMCTLD_PORT, SLURMD_PORT, SLURMDBD_PORT, Blueprint, Layout

TEMPLATES = Path(__file__).resolve().parents[2] / "slurm" / "sandbox"
FIRST_WITHOUT_CGROUPS = (24, 5)
"""The first Slurm release with CgroupPlugin=disabled; before it, cgroup/v1 is the one that asks nothing of systemd."""


def configuration(
    layout: Layout, blueprint: Blueprint, *, users: list[str], slurm_version: tuple[int, int]
) -> dict[Path, str]:
    """Every configuration file of a sandbox: where it lies -> its text."""
    shape, machines = blueprint.shape, (CONTROLLER, *blueprint.shape.names)
    values = {
        "root": layout.root,
        "subnet": blueprint.subnet,
        "controller": blueprint.address(CONTROLLER),
        "munge_socket": layout.munge_socket,
        "slurmctld_port": SLURMCTLD_PORT,
        "slurmd_port": SLURMD_PORT,
        "slurmdbd_port": SLURMDBD_PORT,
        "cgroup_plugin": "disabled" if slurm_version >= FIRST_WITHOUT_CGROUPS else "cgroup/v1",
        "gres": f"Gres=gpu:h100:{shape.gpus}" if shape.gpus else "",
        "devices": f"Name=gpu Type=h100 File={layout.devices}/gpu[0-{shape.gpus - 1}]" if shape.gpus else "",
        "nodes": "\n".join(f"NodeName={name} NodeAddr={blueprint.address(name)}" for name in shape.names),
        "users": "\n".join(f"add user {user} account=research qos=normal,urgent" for user in users),
    }
    names = ("slurm.conf", "slurmdbd.conf", "gres.conf", "cgroup.conf", "accounting.txt")
    files = {layout.etc / name: Template((TEMPLATES / name).read_text()).substitute(values) for name in names}
    hosts = ["127.0.0.1 localhost", *(f"{blueprint.address(name)} {name}" for name in ("login", *machines))]
    files[layout.hosts] = "\n".join(hosts) + "\n"
    files |= {layout.hostname(name): f"{name}\n" for name in blueprint.machines}
    return files
