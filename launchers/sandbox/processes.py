"""Starting and ending nodes. A process is ours only if its number AND its start time are those it wrote down itself."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from encdec.errors import EncdecError
from launchers.sandbox.layout import Layout
from launchers.sandbox.preflight import SYSTEM_PATH

PROGRAM = Path(__file__).resolve().parents[2]
"""Where `python -m launchers...` is found."""

Namespace = tuple[int, int]
"""Device and inode of /proc/<pid>/ns/net."""

NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
PATIENCE = 5.0
"""Seconds that the kernel gets to start a process or to clear one away."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One process for ever: numbers are used again, but not within one clock tick of one boot of the machine.

    Args:
        pid: as this machine (not the node) numbers it.
        started: clock ticks since the machine booted (proc(5), stat, field 22).
        boot: the machine's boot id.
    """

    pid: int
    started: int
    boot: str

    @classmethod
    def mine(cls) -> Identity:
        pid, _, started = _stat("self")
        return cls(pid=pid, started=started, boot=_boot_id())

    @classmethod
    def read(cls, file: Path) -> Identity | None:
        try:
            return cls(**json.loads(file.read_text()))
        except (FileNotFoundError, json.JSONDecodeError):  # not there, or not fully written yet
            return None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def alive(self) -> bool:
        try:
            pid, state, started = _stat(str(self.pid))
        except (FileNotFoundError, ProcessLookupError):
            return False
        return (pid, started, _boot_id()) == (self.pid, self.started, self.boot) and state not in "ZX"

    def kill(self) -> None:
        """SIGKILL, and wait until it took effect. The kernel ends the rest of a PID namespace with its PID 1."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive:  # asked after the handle is held: from here on it cannot be another process
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                select.select([handle], [], [], PATIENCE)
        finally:
            os.close(handle)


def boot(layout: Layout, name: str) -> Identity:
    """Start a node's PID 1 in fresh namespaces and return who it is. It outlives us."""
    for leftover in layout.run.glob(f"{name}.*"):
        leftover.unlink()
    argv = ["setsid", "--fork", "unshare", *NAMESPACES, "--fork", "--propagation", "slave"]
    argv += [sys.executable, "-m", "launchers.sandbox.node", str(layout.root), name]
    environment = {"PATH": SYSTEM_PATH, "PYTHONPATH": str(PROGRAM)}
    with layout.log_of(name, "init").open("ab") as log:
        subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=layout.root, check=True
        )
    try:
        return _introduction(layout, name)
    except KeyboardInterrupt:
        _introduction(layout, name)  # whoever clears away now must find it
        raise


def _introduction(layout: Layout, name: str) -> Identity:
    """Wait until a node that was just started has written down who it is."""
    deadline = time.monotonic() + PATIENCE
    while not (identity := Identity.read(layout.identity(name))):
        if time.monotonic() > deadline:
            why = tail(layout.log_of(name, "init")) or "its log is empty"
            raise EncdecError(f"Node {name} must start within {PATIENCE:g} s", found=why, remedy="Try again")
        time.sleep(0.01)
    return identity


def namespace(identity: Identity) -> Namespace | None:
    """Which network namespace a living node has; None for a dead one. Needs root."""
    try:
        found = os.stat(f"/proc/{identity.pid}/ns/net")
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if identity.alive else None


def residents(namespaces: set[Namespace]) -> dict[int, str]:
    """Every process in any of these namespaces: its number on this machine -> its name. Needs root."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            home = os.stat(f"/proc/{pid}/ns/net")
            if (home.st_dev, home.st_ino) in namespaces:
                found[int(pid)] = Path(f"/proc/{pid}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it ended, or is not even ours to look at
            continue
    return found


def wait_empty(namespaces: set[Namespace]) -> dict[int, str]:
    """Wait until no process is left in the namespaces; what stays nevertheless."""
    deadline = time.monotonic() + PATIENCE
    while (left := residents(namespaces)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def tail(log: Path, lines: int = 12) -> str:
    """The end of a log, or "" where there is none."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def _stat(pid: str) -> tuple[int, str, int]:
    """(number, state letter, start time in ticks) of a process."""
    number, rest = Path(f"/proc/{pid}/stat").read_text().split(" ", 1)
    fields = rest[rest.rindex(")") + 2 :].split()  # the name in parentheses may itself hold blanks and parentheses
    return int(number), fields[0], int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
