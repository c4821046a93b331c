"""Sandbox: a whole cluster, up and down, and the accidents that happen to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from encdec.errors import ConfigError, EncdecError
from launchers.sandbox import boot, network, preflight, processes, render
from launchers.sandbox.layout import CONTROLLER, SITE, Blueprint, Layout, Shape
from launchers.sandbox.processes import Identity
from launchers.sandbox.status import MachineStatus

PATIENCE = 60.0
"""Seconds until a boot or a return to service is given up; a good one takes 5."""

POLL = 0.05
"""Seconds between two looks while waiting."""

IN_SERVICE = {"idle", "mixed", "allocated", "completing", "planned"}
NULL_DEVICE = os.makedev(1, 3)
MILESTONES = {"mariadbd": "The accounting database", "slurmdbd": "slurmdbd", "slurmctld": "slurmctld"}
"""Step of the controller's boot -> what to call it."""

Say = Callable[[str], None]


def silent(_: str) -> None:
    """A Say that says nothing."""


class Sandbox:
    """The cluster whose whole state lies below one directory."""

    def __init__(self, root: Path | str) -> None:
        self.layout = Layout(Path(root).resolve())

    # --- life

    def up(self, shape: Shape, say: Say = silent) -> None:
        """Bring the cluster up and return when all nodes are idle. A failure leaves nothing behind."""
        preflight.check()
        with self._locked():
            if self.layout.exists and self._up_already(shape, say):
                return
            self._claim()
            try:
                self._bring_up(shape, say)
            except BaseException:
                self._tear_down()
                raise
        if closed := self.layout.unreachable_parent():
            say(f"Note: only root can submit, because other users may not enter {closed}; --dir elsewhere lifts this.")

    def down(self, say: Say = silent) -> None:
        """Take the cluster down and remove every trace of it. Does nothing if there is none."""
        preflight.check_root()
        if not self.layout.exists:
            return say(f"No sandbox at {self.layout.root}.")
        with self._locked():
            self._tear_down()
        return say(f"Sandbox at {self.layout.root} is down.")

    # --- accidents

    def crash(self, name: str) -> None:
        """Power failure: every process of the machine is gone at once."""
        self._living(name).kill()

    def cut(self, name: str) -> None:
        """Network failure: the machine runs on, but nobody reaches it."""
        self._living(name)
        network.set_link(self._living(SITE), name, "down")

    def heal(self, name: str, say: Say = silent) -> None:
        """Boot a machine that is off or lost a daemon, plug in a cut one, and wait until Slurm uses it again."""
        preflight.check_root()
        self._check_name(name)
        site, began = self._living(SITE), time.monotonic()
        if name != CONTROLLER:
            self._living(CONTROLLER)  # without it no node can return to service
        if self.layout.failed(name).exists() and (identity := self._identity(name)):
            identity.kill()
        if self._identity(name) is None:
            self._boot(name)
        network.set_link(site, name, "up")
        self._await(lambda: self._in_service(name), f"{name} must return to service", of=name)
        say(f"{time.monotonic() - began:5.1f} s  {name} is back in service")

    # --- use

    @property
    def environment(self) -> dict[str, str]:
        """What a shell needs so that sbatch, squeue and sacct talk to this cluster."""
        self.layout.blueprint()
        return {"SLURM_CONF": str(self.layout.slurm_conf)}

    def run(self, *argv: str, user: str | None = None, timeout: float = 60, check: bool = True) -> str:
        """Run a command on the login node, as root or as another user, and return what it printed."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        account = pwd.getpwnam(user) if user else None
        settings: dict[str, Any] = {"env": inherited | self.environment, "timeout": timeout}
        if account:
            settings |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        done = subprocess.run(argv, check=False, capture_output=True, text=True, **settings)
        if check and done.returncode != 0:
            found = f"status {done.returncode}: {done.stderr.strip()}"
            raise EncdecError(f"`{' '.join(argv)}` must succeed", found=found, remedy="See `status` and the log folder")
        return done.stdout

    def inside(self, name: str, argv: list[str]) -> list[str]:
        """The command that runs argv on a machine of the sandbox, in the present directory."""
        enter = ["nsenter", f"--target={self._living(name).pid}", *processes.NAMESPACES, "--"]
        settings = [f"{key}={value}" for key, value in self.environment.items()]
        return [*enter, "env", f"--chdir={Path.cwd()}", *settings, *argv]

    def status(self) -> list[MachineStatus]:
        """Every machine: what Slurm says, and what really runs."""
        preflight.check_root()
        blueprint, states = self.layout.blueprint(), self._node_states()
        site = self._identity(SITE)
        cables = network.links_up(site) if site else set()
        return [self._machine_status(name, blueprint, states, cables) for name in blueprint.machines]

    # --- doing it

    def _bring_up(self, shape: Shape, say: Say) -> None:
        began = time.monotonic()

        def report(what: str) -> None:
            say(f"{time.monotonic() - began:5.1f} s  {what}")

        with network.choosing():
            blueprint = Blueprint(shape=shape, subnet=network.free_subnet(str(self.layout.root)))
            self._write_files(blueprint)
            self._boot(SITE)
        report("switch and munge")
        for name in (CONTROLLER, *shape.names):
            self._boot(name)
        for step, what in MILESTONES.items():
            self._await(self.layout.started(CONTROLLER, step).exists, f"{what} must start")
            report(what.removeprefix("The "))
        self._await(lambda: set(self._node_states().values()) == {"idle"}, "All nodes must become idle")
        self.layout.complete.touch()
        report(f"{shape}, all idle")

    def _write_files(self, blueprint: Blueprint) -> None:
        layout = self.layout
        layout.blueprint_file.write_text(blueprint.to_json())
        for folder in layout.folders(blueprint):
            folder.mkdir()
            folder.chmod(0o755)  # whatever the umask: other users' jobs pass through here
        for gpu in layout.gpus(blueprint):
            os.mknod(gpu, stat.S_IFCHR, NULL_DEVICE)
            gpu.chmod(0o666)
        users = list(dict.fromkeys(["nobody", os.environ.get("SUDO_USER", "nobody")]))
        files = render.configuration(layout, blueprint, users=users, slurm_version=preflight.slurm_version())
        for path, text in files.items():
            path.write_text(text)
            path.chmod(0o644)
        layout.slurmdbd_conf.chmod(0o600)
        layout.munge_key.touch(mode=0o600)
        layout.munge_key.write_bytes(secrets.token_bytes(1024))

    def _boot(self, name: str) -> None:
        identity = processes.boot(self.layout, name)
        if name == SITE:
            self._await(self.layout.started(SITE, "munged").exists, "munge must start")
            network.plug_host(identity, self.layout.host_link, self.layout.blueprint().address("login"))
        else:
            network.plug(self._living(SITE), name, identity)

    def _tear_down(self) -> None:
        """End all processes, pull the last cable, remove all files. What is already gone is not missed."""
        identities = [Identity.read(file) for file in self.layout.run.glob("*.json")]
        homes = {home for identity in identities if identity and (home := processes.namespace(identity))}
        for identity in filter(None, identities):
            identity.kill()
        network.unplug_host(self.layout.host_link)
        left = processes.wait_empty(homes)
        for owned in (self.layout.root / name for name in Layout.OWNED):
            shutil.rmtree(owned) if owned.is_dir() else owned.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other people's files may lie beside ours
            self.layout.root.rmdir()
        if left:
            names = ", ".join(f"{name} ({pid})" for pid, name in left.items())
            raise EncdecError("No process may stay in the sandbox's network", found=names, remedy="End it by hand")

    # --- knowing it

    def _up_already(self, shape: Shape, say: Say) -> bool:
        """Whether a living sandbox of this shape is there. Raises ConfigError if it has another shape."""
        there = self.layout.blueprint().shape
        if self._identity(SITE) is None or not self.layout.complete.exists():
            say(f"Clearing away what an earlier sandbox left at {self.layout.root}.")
            self._tear_down()
            self.layout.root.mkdir(parents=True, exist_ok=True)
            return False
        if there != shape:
            remedy = "Take it down first (python -m launchers.sandbox down), or choose another --dir"
            raise ConfigError(f"One directory holds one sandbox; asked for {shape}", found=there, remedy=remedy)
        say(f"Already up: {there}, at {self.layout.root}.")
        for name in self.layout.blueprint().machines:
            if self._identity(name) is None:
                say(f"  {name} is off; `heal {name}` boots it.")
        return True

    def _claim(self) -> None:
        """Refuse a directory in which `down` would remove somebody else's files."""
        if foreign := [name for name in Layout.OWNED if (self.layout.root / name).exists()]:
            rule = f"A new sandbox needs a directory without {', '.join(Layout.OWNED)}"
            found = f"{self.layout.root} with {', '.join(foreign)}"
            raise ConfigError(rule, found=found, remedy="Choose another --dir")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One `up` or `down` at a time for one directory. The lock is on the directory itself and leaves no file."""
        root = self.layout.root
        while True:
            root.mkdir(mode=0o755, parents=True, exist_ok=True)
            handle = os.open(root, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                # a `down` may have removed the directory while we waited for it: then lock its successor
                if root.exists() and os.path.samestat(os.fstat(handle), root.stat()):
                    yield
                    return
            finally:
                os.close(handle)

    def _await(self, done: Callable[[], bool], rule: str, *, of: str = "*") -> None:
        """Wait until done() holds. As soon as machine `of` reports a failure, raise with the end of its log."""
        deadline = time.monotonic() + PATIENCE
        while not done():
            for report in self.layout.run.glob(self.layout.failed(of).name):
                raise self._failure(rule, report)
            if time.monotonic() > deadline:
                found = f"not after {PATIENCE:g} s"
                raise EncdecError(rule, found=found, remedy=f"See `status` and {self.layout.log}")
            time.sleep(POLL)

    def _failure(self, rule: str, report: Path) -> EncdecError:
        what = report.read_text().strip()
        name, step = report.name.removesuffix(".failed"), what.split()[0]  # node.py writes "<step> ended with..."
        log = processes.tail(self.layout.log_of(name, step)) or processes.tail(self.layout.log_of(name, "init"))
        error = EncdecError(rule, found=f"on {name}: {what}", remedy="Repair what the log below names, then try again")
        error.add_note(log)
        return error

    def _check_name(self, name: str) -> None:
        if name not in (machines := self.layout.blueprint().machines[1:]):
            rule = f"A machine of this sandbox is one of {', '.join(machines)}"
            raise ConfigError(rule, found=name, remedy="Name one of them")

    def _identity(self, name: str) -> Identity | None:
        """A machine's PID 1, or None if the machine is off."""
        identity = Identity.read(self.layout.identity(name))
        return identity if identity and identity.alive else None

    def _living(self, name: str) -> Identity:
        preflight.check_root()
        if name != SITE:
            self._check_name(name)
        if identity := self._identity(name):
            return identity
        remedy = "Run down, then up" if name == SITE else f"Boot it: python -m launchers.sandbox heal {name}"
        raise EncdecError(f"{name} must be on", found="off", remedy=remedy)

    def _node_states(self) -> dict[str, str]:
        """Node -> Slurm's word for its state; empty while slurmctld does not answer."""
        if self._identity(CONTROLLER) is None:
            return {}
        try:
            listing = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", timeout=10)
        except (EncdecError, subprocess.TimeoutExpired):
            return {}
        return dict(line.split(maxsplit=1) for line in listing.splitlines())

    def _in_service(self, name: str) -> bool:
        if name == CONTROLLER:
            return self.layout.started(name, "slurmctld").exists() and bool(self._node_states())
        if not self.layout.started(name, "slurmd").exists():
            return False  # what Slurm says now is about the time before the boot
        state = self._node_states().get(name, "")
        if state.startswith("down") or "drain" in state:
            # by itself Slurm returns a down node after some 20 s, and a drained one never
            self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        return state in IN_SERVICE

    def _machine_status(self, name: str, blueprint: Blueprint, states: dict, cables: set[str]) -> MachineStatus:
        identity = self._identity(name)
        space = processes.namespace(identity) if identity else None
        running = processes.residents({space}).values() if space else ()
        daemons = boot.daemons(name, self.layout, blueprint)
        link = "-" if name == SITE or identity is None else "up" if name in cables else "cut"
        return MachineStatus(
            name=name,
            address="-" if name == SITE else blueprint.address(name),
            state=states.get(name, "unknown") if name in blueprint.shape.names else "-",
            link=link,
            daemons=tuple(d for d in daemons if d in running),
            missing=tuple(d for d in daemons if d not in running),
        )
