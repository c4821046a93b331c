"""What each node starts, in order, and when each part counts as started. Pure: node.py does it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from launchers.sandbox.layout import CONTROLLER, SITE, SLURMCTLD_PORT, SLURMD_PORT, SLURMDBD_PORT, Blueprint, Layout
from launchers.sandbox.preflight import SYSTEM_PATH

Address = tuple[str, int] | Path
"""Where a daemon listens: (IP address, port), or the path of a Unix socket."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One program of a node's boot.

    Args:
        name: also the name of its log, and of its process if it is a daemon.
        answers: a daemon counts as started once it accepts connections here; None: a command that must end with 0.
        needs: what must accept connections before this step begins.
        once: the step is skipped if this path exists, and the path exists after it.
        stdin: the file it reads, or None.
    """

    name: str
    argv: tuple[str, ...]
    answers: Address | None = None
    needs: Address | None = None
    once: Path | None = None
    stdin: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def environment(layout: Layout) -> dict[str, str]:
    """What daemons inherit: nothing of the caller's, so that no job of theirs can come to depend on it."""
    return {"PATH": SYSTEM_PATH, "HOME": "/", "LANG": "C.UTF-8", "SLURM_CONF": str(layout.slurm_conf)}


def steps(name: str, layout: Layout, blueprint: Blueprint) -> tuple[Step, ...]:
    """The boot of one machine of the sandbox."""
    if name == SITE:
        return (_munged(layout),)
    if name == CONTROLLER:
        return _controller(layout, blueprint.address(CONTROLLER))
    slurmd = Step(
        name="slurmd",
        argv=("slurmd", "-D", "-b"),  # -b: a node that boots says so, and Slurm stops waiting for its lost jobs
        needs=(blueprint.address(CONTROLLER), SLURMCTLD_PORT),
        answers=(blueprint.address(name), SLURMD_PORT),
    )
    return (slurmd,)


def daemons(name: str, layout: Layout, blueprint: Blueprint) -> tuple[str, ...]:
    """The names of the processes that a healthy machine runs."""
    return tuple(step.name for step in steps(name, layout, blueprint) if step.answers)


def _munged(layout: Layout) -> Step:
    run = layout.run
    argv: tuple[str, ...] = ("munged", "--foreground", "--force", f"--key-file={layout.munge_key}")
    argv += (
        f"--socket={layout.munge_socket}",
        f"--pid-file={run}/munged.pid",
        f"--seed-file={run}/munged.seed",
        f"--log-file={layout.log}/munged.log",
    )
    return Step(name="munged", argv=argv, answers=layout.munge_socket)


def _controller(layout: Layout, address: str) -> tuple[Step, ...]:
    database = _database(layout)
    install = ("mariadb-install-db", *database, "--auth-root-authentication-method=normal", "--skip-test-db")
    local = (f"--socket={layout.database_socket}", "--skip-networking", "--skip-grant-tables")
    serve = ("mariadbd", *database, *local, f"--pid-file={layout.run}/mariadbd.pid")
    beside = {"MYSQL_UNIX_PORT": str(layout.database_socket)}
    accounts, done = layout.accounting, layout.accounting_done
    return (
        Step(name="mariadb-install", argv=install, once=layout.database / "mysql"),
        Step(name="mariadbd", argv=serve, answers=layout.database_socket),
        Step(name="slurmdbd", argv=("slurmdbd", "-D"), answers=(address, SLURMDBD_PORT), environment=beside),
        Step(name="accounting", argv=("sacctmgr", "--immediate"), stdin=accounts, once=done),
        Step(name="slurmctld", argv=("slurmctld", "-D"), answers=(address, SLURMCTLD_PORT)),
    )


def _database(layout: Layout) -> tuple[str, ...]:
    """MariaDB's settings: private, small, and never waiting for the disk: the data need not outlive this machine."""
    return (
        "--no-defaults",
        "--user=root",
        f"--datadir={layout.database}",
        f"--tmpdir={layout.run}",  # names there are made of process ids, which two sandboxes have alike
        "--performance-schema=OFF",
        "--innodb-buffer-pool-size=32M",
        "--innodb-log-file-size=8M",
        "--innodb-lock-wait-timeout=900",
        "--innodb-flush-method=nosync",
        "--aria-log-file-size=8M",
        "--aria-sync-log-dir=NEVER",
        "--sync-frm=OFF",
    )
