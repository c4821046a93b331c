"""What `status` says about each machine of a sandbox, and its table. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MachineStatus:
    """One line of `status`.

    Args:
        state: Slurm's word for a node's state; "-" for machines that are not nodes.
        link: "up", "cut", or "-" for a machine that is off.
        daemons: the daemons that run, then those that should and do not.
    """

    name: str
    address: str
    state: str
    link: str
    daemons: tuple[str, ...]
    missing: tuple[str, ...]


def table(machines: list[MachineStatus]) -> str:
    rows = [("MACHINE", "ADDRESS", "STATE", "LINK", "DAEMONS")]
    for m in machines:
        daemons = [*m.daemons, *(f"{name} (off)" for name in m.missing)]
        rows.append((m.name, m.address, m.state, m.link, ", ".join(daemons)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
