"""PID 1 of every node: python -m launchers.sandbox.node ROOT NAME, inside fresh namespaces.

Makes the namespaces look like a machine of their own, starts what boot.py lists, and then reaps orphans for ever, as an
init must. It is ended by SIGKILL, which is what a power failure looks like to the rest of the cluster. It ends itself
when the file that says who it is has gone, so that nothing outlives the sandbox's directory.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launchers.sandbox import boot, network
from launchers.sandbox.layout import SITE, Blueprint, Layout
from launchers.sandbox.processes import Identity

POLL = 0.02
"""Seconds between two looks at something that is about to happen."""

WATCH = 0.5
"""Seconds between two looks at whether the sandbox is still wanted."""


def main(root: str, name: str) -> None:
    layout = Layout(Path(root))
    blueprint = layout.blueprint()
    identity = Identity.mine()  # while /proc still shows this machine's numbers
    layout.identity(name).write_text(identity.to_json())
    threading.Thread(target=_end_with_the_files, args=(layout.identity(name), identity), daemon=True).start()
    running: dict[int, str] = {}
    try:
        _furnish(layout, name)
        _connect(name, blueprint)
        for step in boot.steps(name, layout, blueprint):
            _start(step, name, layout, running)
    except (OSError, subprocess.SubprocessError) as problem:
        _report(layout, name, str(problem))
    _reap(layout, name, running)


def _end_with_the_files(file: Path, identity: Identity) -> None:
    while Identity.read(file) == identity:
        time.sleep(WATCH)
    os._exit(1)  # the whole node goes with its PID 1


def _furnish(layout: Layout, name: str) -> None:
    """Own host name, /proc, /sys and /dev/shm; the names of all nodes in /etc/hosts."""
    socket.sethostname(name)
    for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/dev/shm")):
        subprocess.run(["mount", "-t", kind, kind, where], check=True)
    for ours, theirs in ((layout.hosts, Path("/etc/hosts")), (layout.hostname(name), Path("/etc/hostname"))):
        if theirs.exists():
            subprocess.run(["mount", "--bind", ours, theirs], check=True)


def _connect(name: str, blueprint: Blueprint) -> None:
    if name == SITE:
        return network.make_switch()
    while not Path("/sys/class/net", network.INSIDE).exists():
        time.sleep(POLL)
    return network.take_address(blueprint.address(name))


def _start(step: boot.Step, name: str, layout: Layout, running: dict[int, str]) -> None:
    """Run one step until it counts as started. Raises SubprocessError if it ends first, or badly."""
    while step.needs and not _accepts(step.needs):
        time.sleep(POLL)
    if not (step.once and step.once.exists()):
        with layout.log_of(name, step.name).open("ab") as log, open(step.stdin or os.devnull, "rb") as stdin:
            settings: dict[str, Any] = {"env": boot.environment(layout) | step.environment, "umask": 0o022}
            process = subprocess.Popen(
                step.argv, cwd=layout.root, stdin=stdin, stdout=log, stderr=log, start_new_session=True, **settings
            )
        if step.answers:
            running[process.pid] = step.name
        while not (step.answers and _accepts(step.answers)):
            if (status := process.poll()) is not None:
                if status or step.answers:
                    running.pop(process.pid, None)
                    raise subprocess.SubprocessError(f"{step.name} ended with status {status}")
                break
            time.sleep(POLL)
        if step.once and not step.once.exists():
            step.once.touch()
    layout.started(name, step.name).touch()


def _accepts(address: boot.Address) -> bool:
    """Whether something accepts connections at a port or a Unix socket."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(str(address) if isinstance(address, Path) else address) == 0


def _reap(layout: Layout, name: str, running: dict[int, str]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:  # nothing left to wait for, but a machine without processes is still a machine
            time.sleep(1)
            continue
        if pid in running:
            _report(layout, name, f"{running.pop(pid)} ended with status {os.waitstatus_to_exitcode(status)}")


def _report(layout: Layout, name: str, what: str) -> None:
    with layout.failed(name).open("a") as file:
        file.write(what + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
